# Pushes of a server: messages, subscriptions and changed keys; the compiled twin of ``pushes.py``.


cdef int take_push(Pipeline pipeline, push) except -1:
    """Take a message, or let the near cache drop the records that changed.

    All other pushes go to ``on_push``.
    """
    if pipeline.inbox is not None and is_message(push):
        return take_message(pipeline, push)
    if not failures.is_push(push):
        raise failures.no_push(pipeline.address, push)
    if pipeline.inbox is not None and push[0] in e.SUBSCRIPTIONS:
        return take_subscription(pipeline, push)
    if push[0] != b"invalidate" or pipeline.near is None:
        if pipeline.on_push is not None:
            pipeline.on_push(push)
        return 0
    if len(push) != 2 or not (push[1] is None or type(push[1]) is list):
        raise wrong_shape(pipeline, "a change of keys", push)
    if pipeline.near.invalidate(push[1]):
        pipeline.forget("flushall")
    return 0


cdef int take_message(Pipeline pipeline, push) except -1:
    cdef object channel, payload
    if pipeline.inbox is not None and PyList_GET_SIZE(push) == 3:
        channel = <object>PyList_GET_ITEM(push, 1)
        payload = <object>PyList_GET_ITEM(push, 2)
        if PyBytes_CheckExact(channel) and PyBytes_CheckExact(payload):
            pipeline.inbox.take(channel, payload)
            return 0
    raise wrong_shape(pipeline, "a subscription", push)


cdef int take_subscription(Pipeline pipeline, push) except -1:
    """Take the push that confirms a subscription, or ends one unasked."""
    cdef _Batch batch
    if pipeline.slots:
        batch = pipeline.slots[0][0]
        if (
            batch.kind == COMMAND
            and not batch.abandoned()
            and batch.names[0].lower().encode() == push[0]
        ):
            return answer(pipeline, list(push))
    pipeline.inbox.on_ended(pipeline, list(push))
    return 0
