# Messages and the queues of their subscribers; the compiled twin of
# ``message.py``.

from collections.abc import Mapping as _Mapping

cdef extern from "Python.h":
    object PyUnicode_FromFormat(const char* format, ...)
    object PyUnicode_DecodeUTF8(const char* text, Py_ssize_t size, const char* errors)

cdef int DROP_NEWEST = e.DROP_NEWEST
cdef int DISCONNECT = e.DISCONNECT
cdef long long MAX_TOPIC = e.MAX_TOPIC
cdef bytes FROM = e.FROM
cdef bytes TO = e.TO
cdef bytes BODY = e.BODY + b"{"
cdef bytes TOPIC = b'{"topic":'
cdef bytes PUBLISH_HEADER = e.PUBLISH
cdef bytes SPUBLISH_HEADER = e.SPUBLISH


@cython.final
@cython.no_gc  # as a Record
@cython.freelist(1024)
cdef class Message:
    """One message of another server: immutable, with its JSON decoded on first access.

    ``topic`` is the topic on which it came, ``sender`` the name of the server that sent it, and
    ``raw`` its JSON text in bytes. A message can be read as the mapping that it holds:
    ``message["name"]``.
    """

    cdef readonly long long topic
    cdef readonly str sender
    cdef bytes _raw
    cdef bytes _payload
    cdef Py_ssize_t _start
    cdef object _data

    def __init__(self, long long topic, str sender not None, bytes raw not None):
        self.topic = topic
        self.sender = sender
        self._raw = raw
        self._payload = None
        self._data = _UNDECODED

    @property
    def raw(self):
        """The JSON text of the message, without its envelope, in bytes."""
        cdef PyObject* known = dscache_load(raw_of_message(self))
        if known != <PyObject*>None:
            return <object>known
        raw = self._payload[self._start : -1]
        return dscache_settle(raw_of_message(self), <PyObject*>None, <PyObject*>raw)

    @property
    def data(self):
        """The decoded JSON: decoded on first access, and shared by all receivers of this message.

        Raises MessageError if the text isn't valid JSON.
        """
        cdef PyObject* known = dscache_load(data_of_message(self))
        if known != <PyObject*>_UNDECODED:
            return <object>known
        raw = self.raw
        try:
            data = _decode_json(raw)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise_interruption(error)
            data = e.decode_tolerantly(self.topic, self.sender, raw, self._payload)
        return dscache_settle(data_of_message(self), <PyObject*>_UNDECODED, <PyObject*>data)

    def decode(self, type, /):
        """Return the data as ``type``: a ``msgspec.Struct``, dataclass or other type of msgspec's.

        Raises MessageError, with the path of the mismatch, if the data doesn't fit, or if the text
        isn't valid JSON.
        """
        return e.decode_as(self.topic, self.sender, self.raw, self._payload, type)

    def get(self, key, default=None, /):
        """Return one member of the data, or ``default`` if there is none."""
        return self.data.get(key, default)

    def keys(self):
        """Return the names of the data's members."""
        return self.data.keys()

    def values(self):
        """Return the values of the data's members."""
        return self.data.values()

    def items(self):
        """Return the names of the data's members with their values."""
        return self.data.items()

    def __getitem__(self, key, /):
        return self.data[key]

    def __contains__(self, key, /):
        return key in self.data

    def __iter__(self):
        return iter(self.data)

    def __len__(self):
        return len(self.data)

    def __eq__(self, other):
        cdef Message message
        if not isinstance(other, Message):
            return self.data == other if isinstance(other, dict) else NotImplemented
        message = other
        return (
            self.topic == message.topic
            and self.sender == message.sender
            and self.raw == message.raw
        )

    def __hash__(self):
        return hash((self.topic, self.sender, self.raw))

    def __repr__(self):
        return f"Message({self.topic}, {shorten(self.sender)}, {shorten(self.raw)})"

    def __reduce__(self):
        from ._backend import make_message
        return (make_message, (self.topic, self.sender, self.raw))

    def __setattr__(self, name, value):
        raise AttributeError(f"a Message is immutable: {name} can't be set")

    def __delattr__(self, name):
        raise AttributeError(f"a Message is immutable: {name} can't be deleted")


_Mapping.register(Message)

cdef extern from *:
    """
    #define dscache_raw_of(owner) (&(owner)->_raw)
    """
    PyObject** data_of_message "dscache_data_of"(Message message) noexcept
    PyObject** raw_of_message "dscache_raw_of"(Message message) noexcept


@cython.final
cdef class SubscriberQueue:
    """Messages that wait for one subscriber, at most ``max_pending``.

    ``wake`` is called for the first message that arrives while the subscriber isn't ``awake``. The
    subscriber clears ``awake`` when it has taken all messages. When the queue is full, ``overflow``
    says which message is dropped, and ``dropped`` counts it. A queue that ``is_shut`` takes no more
    messages.
    """

    cdef readonly object messages
    cdef public bint awake
    cdef public bint is_shut
    cdef readonly unsigned long long dropped
    cdef readonly unsigned long long received
    cdef object _wake
    cdef object _append
    cdef Py_ssize_t _max_pending
    cdef int _overflow

    def __init__(self, wake, Py_ssize_t max_pending, int overflow):
        self.messages = deque()
        self._append = self.messages.append
        self._wake = wake
        self._max_pending = max_pending
        self._overflow = overflow

    cpdef put(self, Message message):
        """Add a message, unless the queue is shut or ``overflow`` drops it."""
        if self.is_shut:
            return
        self.received += 1
        if len(self.messages) >= self._max_pending:
            self.dropped += 1
            if self._overflow == DROP_NEWEST:
                return
            if self._overflow == DISCONNECT:
                self.is_shut = True
            else:
                self.messages.popleft()
        if not self.is_shut:
            self._append(message)
        if not self.awake:
            self._wake()
            self.awake = True  # behind it, as it may raise


@cython.final
cdef class MessageDispatcher:
    """Gives each message that is pushed to one server to its subscribers of the topic.

    ``on_ended`` is called with the pipeline and the push when a server ends a subscription by
    itself. ``on_damaged`` is called with a topic and a payload that is no envelope. ``on_own`` is
    called with the topic of a message from the server of this name. ``is_crowded`` returns whether
    the subscribers have enough to do.

    A message belongs to the topic that it states, as in deepstream's connector. One that states
    none, which only Python sends, belongs to its channel.
    """

    cdef readonly object is_crowded, on_ended
    cdef str _name
    cdef bytes _own
    cdef object _on_damaged, _on_own
    cdef dict _topics  # of each channel: its topic, and a list of queues
    cdef bytes _last_sender
    cdef str _last_name
    cdef unsigned long long _count_received, _count_own, _count_foreign
    cdef unsigned long long _count_unwanted, _count_damaged

    def __init__(
        self,
        str server_name not None,
        on_ended,
        on_damaged,
        is_crowded=lambda: False,
        on_own=lambda topic: None,
    ):
        self.is_crowded = is_crowded
        self._name = server_name
        self._own = server_name.encode()
        self.on_ended = on_ended
        self._on_damaged = on_damaged
        self._on_own = on_own
        self._topics = {}
        self._last_sender = b""
        self._last_name = ""

    def join(self, long long topic, SubscriberQueue queue not None):
        """Give a queue the messages of a topic from now on."""
        self._topics.setdefault(b"%d" % topic, (topic, []))[1].append(queue)

    def leave(self, long long topic, SubscriberQueue queue not None):
        """Give a queue no more messages of a topic; return whether it was the last of the topic."""
        channel = b"%d" % topic
        queues = self._topics[channel][1]
        queues.remove(queue)
        if not queues:
            del self._topics[channel]
        return not queues

    def stats(self):
        """Return the counts of messages: delivered, own, for others, without subscribers."""
        return {
            "received": self._count_received,
            "own": self._count_own,
            "foreign": self._count_foreign,
            "unwanted": self._count_unwanted,
            "damaged": self._count_damaged,
        }

    cpdef take(self, bytes channel, bytes payload):
        """Give a message to its subscribers."""
        cdef PyObject* found = PyDict_GetItem(self._topics, channel)
        cdef tuple place
        cdef list queues
        cdef Message message
        if found == NULL:
            self._count_unwanted += 1
            return
        place = <tuple>found
        message = self._open(place[0], payload)
        if message is None:
            return
        queues = place[1]
        if not self._agrees(message, channel):
            stated = e.stated_topic(place[0], message)
            if stated != place[0]:
                found = PyDict_GetItem(self._topics, b"%d" % stated)
                if found == NULL:
                    self._count_unwanted += 1
                    return
                message = Message(stated, message.sender, message.raw)
                queues = (<tuple>found)[1]
        self._count_received += 1
        if PyList_GET_SIZE(queues) == 1:
            (<SubscriberQueue>PyList_GET_ITEM(queues, 0)).put(message)
            return
        for queue in list(queues):  # one that is disconnected leaves the list
            (<SubscriberQueue>queue).put(message)
        return

    cdef inline bint _agrees(self, Message message, bytes channel) noexcept:
        """Return whether a message begins with the topic of its channel, as most do."""
        cdef bytes text = message._payload if message._raw is None else message._raw
        cdef const char* start = PyBytes_AS_STRING(text)
        cdef const char* end = start + PyBytes_GET_SIZE(text)
        cdef const char* at = start if message._raw is not None else start + message._start
        at = passed(at, end, TOPIC)
        if at == NULL:
            return False
        at = passed(at, end, channel)
        return at != NULL and at < end and at[0] == 44  # ","

    cdef Message _open(self, long long topic, bytes payload):
        """Return the message of an envelope, unless it is from here or for others."""
        cdef const char* start = PyBytes_AS_STRING(payload)
        cdef const char* end = start + PyBytes_GET_SIZE(payload)
        cdef const char* sender = passed(start, end, FROM)
        cdef const char* to = NULL
        cdef const char* at
        cdef Py_ssize_t sender_size, to_size = 0
        if sender == NULL or end[-1] != 125 or end[-2] != 125:  # "}"
            return self._read(topic, payload)
        at = end_of_name(sender, end)
        if at == NULL:
            return self._read(topic, payload)
        sender_size = at - sender
        at += 1
        to = passed(at, end, TO)
        if to != NULL:
            at = end_of_name(to, end)
            if at == NULL:
                return self._read(topic, payload)
            to_size = at - to
            at += 1
        at = passed(at, end, BODY)
        if at == NULL:
            return self._read(topic, payload)
        if is_text_of(sender, sender_size, self._own):
            self._count_own += 1
            self._on_own(topic)
            return None
        if to != NULL and not is_text_of(to, to_size, self._own):
            self._count_foreign += 1
            return None
        # Few servers send much, and one after the other.
        if not is_text_of(sender, sender_size, self._last_sender):
            self._last_sender = sender[:sender_size]
            self._last_name = PyUnicode_DecodeUTF8(sender, sender_size, b"replace")
        cdef Message message = Message.__new__(Message)
        message.topic = topic
        message.sender = self._last_name
        message._payload = payload
        message._start = at - start - 1
        message._data = _UNDECODED
        return message

    cdef Message _read(self, long long topic, bytes payload):
        """Do as ``_open`` with an envelope that JSON.stringify doesn't write."""
        opened = e.read(payload)
        if opened is None:
            self._count_damaged += 1
            self._on_damaged(topic, payload)
            return None
        sender, to, raw = opened
        if sender == self._name:
            self._count_own += 1
            self._on_own(topic)
            return None
        if to is not msgspec.UNSET and to != self._name:
            self._count_foreign += 1
            return None
        return Message(topic, sender, raw)


cdef inline const char* passed(const char* at, const char* end, bytes text) noexcept:
    """Return the position behind a text, or NULL if the text isn't there."""
    cdef Py_ssize_t size = PyBytes_GET_SIZE(text)
    if end - at < size or memcmp(at, PyBytes_AS_STRING(text), size):
        return NULL
    return at + size


cdef inline const char* end_of_name(const char* at, const char* end) noexcept:
    """Return where a JSON text ends; NULL if it doesn't, or has an escape."""
    while at < end and at[0] != 34 and at[0] != 92:  # a quotation mark, a backslash
        at += 1
    return at if at < end and at[0] == 34 else NULL


cdef inline bint is_text_of(const char* text, Py_ssize_t size, bytes other) noexcept:
    return size == PyBytes_GET_SIZE(other) and not memcmp(text, PyBytes_AS_STRING(other), size)


cdef inline bint is_message(push) noexcept:
    """Return whether a push brings a message."""
    cdef object kind
    if not PyList_GET_SIZE(push):
        return False
    kind = <object>PyList_GET_ITEM(push, 0)
    if not PyBytes_CheckExact(kind):
        return False
    cdef const char* text = PyBytes_AS_STRING(kind)
    if PyBytes_GET_SIZE(kind) == 8 and text[0] == 115:  # "s"
        return not memcmp(text + 1, b"message", 7)
    return PyBytes_GET_SIZE(kind) == 7 and not memcmp(text, b"message", 7)


cdef long long topic_of(topic, message) except -1:
    """Return a topic, that of the message if it is None, or raise MessageError."""
    cdef PyObject* stated
    if topic is None:
        if type(message) is not dict:
            return e.topic_of(message)
        stated = PyDict_GetItem(message, "topic")
        if stated == NULL:
            return e.topic_of(message)
        topic = <object>stated
    if type(topic) is int and 0 <= topic <= MAX_TOPIC:
        return topic
    return e.check_topic(topic)


cdef str name_of_message(long long topic, unsigned long long number):
    """Return the name of a message in its batch."""
    return PyUnicode_FromFormat(b"{%lld}%llu", topic, number)


cdef bytes pack_message(long long topic, bytes opening, message, bint sharded):
    """Return the command that sends a message, or raise MessageError."""
    cdef bytes body
    try:
        body = json_text.encode_json(message)
    except Exception as error:  # msgspec raises whatever a user's own type raises
        raise_interruption(error)
        body = e.encode_tolerantly(topic, message)
    if not body:
        raise e.empty_raw(topic)
    cdef bytes header = SPUBLISH_HEADER if sharded else PUBLISH_HEADER
    cdef char digits[20]
    cdef Py_ssize_t channel_size = put_digits(digits, topic) - digits
    cdef Py_ssize_t size = PyBytes_GET_SIZE(opening) + PyBytes_GET_SIZE(body) + 1
    cdef char lengths[64]
    cdef char* at = put_length(lengths, 36, channel_size)
    at = put_end(put_bytes(at, digits, channel_size))
    at = put_length(at, 36, size)
    cdef Py_ssize_t total = PyBytes_GET_SIZE(header) + (at - lengths) + size + 2
    cdef bytes text = PyBytes_FromStringAndSize(NULL, total)
    cdef char* to = PyBytes_AS_STRING(text)
    to = put_bytes(to, PyBytes_AS_STRING(header), PyBytes_GET_SIZE(header))
    to = put_bytes(to, lengths, at - lengths)
    to = put_bytes(to, PyBytes_AS_STRING(opening), PyBytes_GET_SIZE(opening))
    to = put_bytes(to, PyBytes_AS_STRING(body), PyBytes_GET_SIZE(body))
    to[0] = 125  # "}"
    put_end(to + 1)
    return text
