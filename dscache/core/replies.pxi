# Replies to operations, a function for each kind; the compiled twin of ``replies.py``.


cdef int answer(Pipeline pipeline, reply) except -1:
    """Settle the first slot. It stays in place till then, so that nothing is lost on the way
    if the reply turns out to be of the wrong shape."""
    if not pipeline.slots or pipeline.severed:
        raise failures.stray_reply(pipeline.address, reply)
    cdef tuple slot = pipeline.slots[0]
    cdef _Batch batch = slot[0]
    cdef Py_ssize_t count = slot[1]
    cdef object stored = None
    if batch.asking and not pipeline._asked:
        pipeline._asked = True
        return 0
    pipeline._asked = False
    if batch.kind == HEAD:
        if pipeline._version_reply is _INCOMPLETE:
            pipeline._version_reply = reply
            return 0
        stored, pipeline._version_reply = pipeline._version_reply, _INCOMPLETE
        if batch.asking:
            stored, reply = reply, stored
        if type(stored) is ReplyError and stored.code != "WRONGTYPE":
            reply = stored
    cdef list found = pipeline._replies.take_found()
    cdef Py_ssize_t i, timed = 0, first = batch.answered
    cdef bint refused = type(reply) is ReplyError
    cdef bint was_over = batch.abandoned()
    if was_over:
        batch.answered += count
    elif refused:
        refusals.refused(pipeline, batch, count, reply)
    elif batch.kind == GET:
        if reply is not _IN_PLACE:
            add_found(pipeline, batch, count, found, reply)
        answer_get(pipeline, batch, found)
    elif batch.kind == HEAD:
        answer_head(pipeline, batch, stored, reply)
    elif batch.kind == SET:
        answer_set(pipeline, batch, count, reply == b"OK", reply)
    elif batch.kind == SET_TTL and pipeline.has_msetex:
        answer_set(pipeline, batch, count, type(reply) is int and reply == 1, reply)
    elif batch.kind == DELETE:
        answer_delete(pipeline, batch, reply)
    elif batch.kind == COMMAND:
        _resolve(batch.entries[0], reply)
        batch.answered = 1
    elif batch.kind >= READ_KEY:
        answer_key(pipeline, batch, reply)
    else:
        if type(reply) is int and reply == WRITTEN:
            reply = [WRITTEN] * count
        answer_script(pipeline, batch, count, check_array(pipeline, reply, count, "the set script"))
    pipeline.slots.popleft()
    pipeline.settled += 1
    if pipeline.epoch is not None:
        pipeline.epoch.answered(pipeline.settled)
    pipeline.in_flight -= count
    if batch.bulk is None:
        pipeline.operations -= count
        timed = count
    elif batch.counted and (
        batch.answered == PyList_GET_SIZE(batch.names) or batch.abandoned()
    ):
        batch.counted = False
        pipeline.operations -= 1
        timed = 1
    if timed and not (was_over or refused) and batch.kind < COMMAND:
        count_latency(pipeline, batch, timed)
    if SET <= batch.kind <= DELETE_IF or batch.kind >= READ_KEY:
        for i in range(first, first + count):
            pipeline.pending_bytes -= size_of_text(<object>PyList_GET_ITEM(batch.entries, i))
    if pipeline.near is not None and SET <= batch.kind <= DELETE:
        for i in range(first, first + count):
            pipeline.near.drop(<str>PyList_GET_ITEM(batch.names, i))
    return 0


cdef void count_latency(Pipeline pipeline, _Batch batch, Py_ssize_t count) noexcept:
    """Count how long so many operations have taken, from the first call of their batch."""
    cdef Py_ssize_t row = batch.kind
    cdef Py_ssize_t bucket = 0
    if pipeline._now == 0.0:
        pipeline._now = dscache_monotonic()
    if row >= DELETE_IF:
        row = SET + 1
    elif row > SET:
        row = SET
    if batch.bulk is not None:
        row += TIMED // 2
    cdef double seconds = pipeline._now - (batch.deadline - pipeline.timeout)
    while bucket < LATENCY_BOUNDS and seconds > latency_bounds[bucket]:
        bucket += 1
    pipeline._seconds[row] += seconds * count
    pipeline._latencies[row * (LATENCY_BOUNDS + 1) + bucket] += count


cdef int add_found(Pipeline pipeline, _Batch batch, Py_ssize_t count, list found, reply) except -1:
    """Add the records of a list reply that were not read in place."""
    cdef Py_ssize_t first = PyList_GET_SIZE(found)
    cdef list values = check_array(pipeline, reply, 2 * (count - first), "MGET")
    cdef object stored, raw
    cdef str name
    cdef long long version
    cdef Py_ssize_t i
    for i in range(count - first):
        stored = <object>PyList_GET_ITEM(values, 2 * i)
        raw = <object>PyList_GET_ITEM(values, 2 * i + 1)
        if PyBytes_CheckExact(stored) and PyBytes_CheckExact(raw):
            version = parse_version(<bytes>stored)
            name = <str>PyList_GET_ITEM(batch.names, batch.answered + first + i)
            found.append(stored if version < 0 else _record(name, version, <bytes>raw))
        elif stored is None and raw is None:
            found.append(None)
        elif (stored is None or type(stored) is bytes) and (raw is None or type(raw) is bytes):
            found.append(_HALF)
        else:
            wrong = raw if stored is None or type(stored) is bytes else stored
            found.append(wrong_shape(pipeline, "MGET", wrong))
    return 0


cdef int answer_get(Pipeline pipeline, _Batch batch, list found) except -1:
    # Redis sends no invalidation for records read by ASKING.
    cdef _Epoch epoch = None if batch.asking else pipeline.epoch
    cdef _Bulk bulk = batch.bulk
    cdef dict result = None if bulk is None else bulk.result
    cdef Py_ssize_t settled = 0
    cdef object one, entry
    cdef str name
    cdef Record record
    try:
        for one in found:
            name = <str>PyList_GET_ITEM(batch.names, batch.answered)
            entry = <object>PyList_GET_ITEM(batch.entries, batch.answered)
            if entry is _DISCARDED:
                batch.answered += 1
                continue
            if type(one) is Record:
                record = <Record>one
                pipeline._hits += 1
                if epoch is not None:
                    pipeline.near.fill(
                        pipeline, epoch, batch.serial, name, record.version, record.raw,
                        slot_known(batch, entry),
                    )
                if bulk is not None:
                    PyDict_SetItem(result, name, record)
                elif type(entry) is list:
                    for waiter in <list>entry:
                        _resolve(waiter, _record(name, record.version, record.raw))
                else:
                    _resolve(entry, record)
            elif one is None or one is _HALF:
                pipeline._halves += one is not None
                pipeline._misses += 1
                if epoch is not None:
                    pipeline.near.fill(
                        pipeline, epoch, batch.serial, name, 0, None, slot_known(batch, entry)
                    )
                if bulk is not None:
                    bulk.missing.append(name)
                else:
                    _resolve(entry, None)
            elif type(one) is bytes:
                damaged(pipeline, batch, name, entry, one)
            else:
                raise one
            pipeline._reads += 1
            batch.answered += 1
            settled += 1
    finally:  # those before one of the wrong shape have their outcome
        if bulk is not None:
            bulk.settle(settled)
    return 0


cdef inline int slot_known(_Batch batch, entry) noexcept:
    """Return the slot of the record that a reply is about, or -1 if it isn't known."""
    if batch.hash_slots != NULL:
        return batch.hash_slots[batch.answered]
    return (<_PendingRead>entry).slot if type(entry) is _PendingRead else -1


cdef int answer_head(Pipeline pipeline, _Batch batch, stored, reply) except -1:
    cdef str name = batch.names[batch.answered]
    cdef object entry = batch.entries[batch.answered]
    if batch.asking and type(reply) is int:  # how many of both keys there are
        reply = c.STRING if reply == 2 else c.NO_STRING[0]
    cdef bint has_data = reply == c.STRING
    cdef bint has_version = type(stored) is bytes
    cdef long long version = -1
    if not has_data and reply not in c.NO_STRING:
        raise wrong_shape(pipeline, "TYPE", reply)
    if not has_version and stored is not None and type(stored) is not ReplyError:
        raise wrong_shape(pipeline, "GET", stored)
    if entry is _DISCARDED:
        batch.answered += 1
        return 0
    pipeline._reads += 1
    if has_version and has_data:
        version = parse_version(<bytes>stored)
        if version < 0:
            damaged(pipeline, batch, name, entry, stored)
        else:
            pipeline._hits += 1
            if batch.bulk is None:
                _resolve(entry, version)
            else:
                batch.bulk.result[name] = version
    else:
        if has_version or has_data:
            pipeline._halves += 1
        pipeline._misses += 1
        if batch.bulk is None:
            _resolve(entry, None)
    batch.answered += 1
    if batch.bulk is not None:
        batch.bulk.settle(1)
    return 0


cdef int answer_set(Pipeline pipeline, _Batch batch, Py_ssize_t count, bint done, reply) except -1:
    cdef Py_ssize_t i
    if not done:
        raise wrong_shape(pipeline, "MSET or MSETEX", reply)
    if batch.bulk is None:
        for i in range(batch.answered, batch.answered + count):
            _resolve((<_Write>PyList_GET_ITEM(batch.entries, i)).waiter, True)
    pipeline._writes += count
    batch.answered += count
    if batch.bulk is not None:
        batch.bulk.settle(count)
    return 0


cdef int answer_script(Pipeline pipeline, _Batch batch, Py_ssize_t count, list reply) except -1:
    cdef _Bulk bulk = batch.bulk
    cdef Py_ssize_t settled = 0
    cdef _Write entry
    cdef str name
    try:
        for value in reply:
            name = <str>PyList_GET_ITEM(batch.names, batch.answered)
            entry = <_Write>PyList_GET_ITEM(batch.entries, batch.answered)
            if type(value) is ReplyError:
                make = refusals.refusal_at(pipeline, value, batch, batch.answered)
                outcomes.give_error(pipeline, batch, name, entry, make)
            elif value == UNTOLD and batch.answered < batch.repeated:
                operation = failures.describe(batch.kind, name)
                make = partial(failures.untold, pipeline.address, operation)
                outcomes.give_error(pipeline, batch, name, entry, make)
            elif type(value) is not int or not DAMAGED <= value <= WRITTEN:
                raise wrong_shape(pipeline, "the set script", value)
            elif value == DAMAGED:
                damaged(pipeline, batch, name, entry, None)
            else:
                if value != WRITTEN:
                    pipeline._not_newer += 1
                elif batch.kind == DELETE_IF:
                    pipeline._deletes += 1
                else:
                    pipeline._writes += 1
                if bulk is None:
                    _resolve(entry.waiter, value == WRITTEN)
                elif batch.kind == DELETE_IF:
                    bulk.result += value
                elif value == NOT_NEWER:
                    bulk.result.add(name)
            batch.answered += 1
            settled += 1
    finally:  # those before one of the wrong shape have their outcome
        if bulk is not None:
            bulk.settle(settled)
    return 0


cdef int answer_delete(Pipeline pipeline, _Batch batch, reply) except -1:
    if type(reply) is not int or not 0 <= reply <= 2:
        raise wrong_shape(pipeline, "DEL", reply)
    if reply == 1:
        pipeline._halves += 1
    pipeline._deletes += 1
    if batch.bulk is None:
        _resolve(batch.entries[batch.answered], reply == 2)
    batch.answered += 1  # behind it, as it may raise
    if batch.bulk is not None:
        batch.bulk.result += reply == 2
        batch.bulk.settle(1)
    return 0


cdef int answer_key(Pipeline pipeline, _Batch batch, reply) except -1:
    cdef bint fits
    if batch.kind == READ_KEY:
        fits = reply is None or type(reply) is bytes
    elif batch.kind == PUBLISH:
        fits = type(reply) is int and reply >= 0
    else:
        fits = reply == b"OK" or (type(reply) is int and 0 <= reply <= 1)
    if not fits:
        raise wrong_shape(pipeline, "a command of one key", reply)
    cdef _Command entry = <_Command>PyList_GET_ITEM(batch.entries, batch.answered)
    _resolve(entry.waiter, reply)
    batch.answered += 1
    return 0


cdef list check_array(Pipeline pipeline, reply, Py_ssize_t length, str command):
    if type(reply) is not list or PyList_GET_SIZE(reply) != length:
        raise wrong_shape(pipeline, command, reply)
    return reply


cdef object wrong_shape(Pipeline pipeline, str command, reply):
    return ProtocolError(f"{pipeline.address}: unexpected reply to {command}: {shorten(reply)}")


cdef int damaged(Pipeline pipeline, _Batch batch, str name, entry, stored) except -1:
    pipeline._damages += 1
    make = partial(failures.damaged_version, name, stored)
    outcomes.give_error(pipeline, batch, name, entry, make)
    return 0
