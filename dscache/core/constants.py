"""Constants of both cores: limits of batches, kinds of operation, RESP and error codes.

The twins ``_fast`` and ``core.pure`` import this module and nothing of each other, so that no
constant stands twice.
"""

from __future__ import annotations

from typing import Final

# Re-exported, so that both cores find every constant in this module.
from .._limits import MAX_PENDING as MAX_PENDING
from .._limits import MAX_PENDING_BYTES as MAX_PENDING_BYTES
from .._limits import MAX_REPLY_BYTES as MAX_REPLY_BYTES
from .._limits import MAX_TTL as MAX_TTL
from .._limits import NEAR_BYTES as NEAR_BYTES
from .._limits import NEAR_RECORDS as NEAR_RECORDS

VERSION_SUFFIX: Final = b"_v"
DATA_SUFFIX: Final = b"_d"

# Under the key layout "hashtag" a record's keys are {<name>}_v and {<name>}_d. A name that
# begins with "}" would make the tag empty, and its two keys would lie in different slots: its
# keys start with "}" instead, which no other key of the layout does, and share one fixed tag.
TAG_OPEN: Final = b"{"
TAG_CLOSE: Final = b"}"
TAG_FOR_BRACE: Final = b"}{0}"

MAX_VERSION: Final = 2**63 - 1

# In place of the seconds of a write that keeps the lifetime of its record.
KEPT_TTL: Final = -1

# Bounds of data to be encoded, the same on every Python: msgspec and ``json`` stop at the end of
# the stack, which comes after 1000 levels on one and after 100,000 on another, and a value that
# leads to its parts on 2**n paths has that many parts in its text. Redis takes 512 MiB.
MAX_DATA_DEPTH: Final = 1000
MAX_DATA_BYTES: Final = 512 * 1024 * 1024
# Buffers for a text, each for a text that is too long for the one before.
DATA_BUFFERS: Final = (2**20, 2**24, 2**26, 2**28, MAX_DATA_BYTES)
# After the second buffer a value of no more containers is looked through. As a rule, honest data
# with a text of 16 MiB has more; a value that leads to its parts on 2**n paths has n.
DATA_CONTAINERS: Final = 20_000

# Records in one MGET or MSET, and about as many in one write to the socket, so that the server has
# begun, and answers come, while the next are encoded and those before are parsed. Bulks of 1000 and
# of 20,000 take 0.90 to 0.95 of the time that they took with 512 and all of it in one write, and
# 1000 reads of one tick 0.90. With 128 it is the same. The cost per record hardly depends on it,
# while the server answers no other client until the command is done.
COMMAND_RECORDS: Final = 256
FLUSH_RECORDS: Final = 256
# Records of one tick with which the server may begin before the tick is over, if it has nothing
# else to do. Else it and the client take turns: with 100 tasks on uvloop, a read took 3.05 us in
# place of 3.72, and a write 4.2 in place of 5.4. With 48 it was the same, with 16 a read took 3.55.
EARLY_RECORDS: Final = 32
# A script costs the server three to ten times as much per record.
SCRIPT_RECORDS: Final = 128
# Text in one write command; also what one flush hands to the transport before it looks up.
COMMAND_BYTES: Final = 1024 * 1024
# Records sent and not yet answered. At three million records a second it covers a round trip
# of 5 ms, and it bounds what a bulk of any size has under way.
WINDOW_RECORDS: Final = 16_384
# An operation during which the server has cut the connection so often is a suspect, which is sent
# alone; and if it is cut so often, it fails.
SUSPECT_LOSSES: Final = 2
FATAL_LOSSES: Final = 3
READ_BUFFER_BYTES: Final = 256 * 1024
# Elements that one reply may announce, in all its incomplete arrays together: hiredis allocates
# room for each when it is announced. The longest reply needed has 1024, and an invalidation of
# many keys some thousands. MAX_DEPTH limits the nesting of arrays; CLUSTER SLOTS needs four levels.
MAX_ELEMENTS: Final = 2**20
MAX_DEPTH: Final = 32
# A length has at most 19 digits; a longer header has no length.
HEADER_BYTES: Final = 64
# Number of names with a fence, which marks their last write. A fence matters only to reads in
# flight that are older. At the limit, such reads are merely not cached.
NEAR_FENCES: Final = 4096
# The longest bulk read whose names later reads may join. It costs the bulk 0.3 µs for each name,
# too much for a longer one.
NEAR_SHARED: Final = 1024

# The kinds of batch. Those below SET read and may be repeated at will.
GET: Final = 0
HEAD: Final = 1
SET: Final = 2
SET_TTL: Final = 3
SET_IF_NEWER: Final = 4  # any write with a condition
DELETE_IF: Final = 5
DELETE: Final = 6
COMMAND: Final = 7
# One key of a record whose two keys lie on different nodes.
READ_KEY: Final = 8
WRITE_KEY: Final = 9
# A message. Its name is {<topic>}<number>: no two are the same, and its slot is its channel's.
PUBLISH: Final = 10
OPERATIONS: Final = (
    *("get", "head", "set", "set", "set", "delete", "delete"),
    *("command", "read", "write", "send"),
)


# Upper bounds of the latency buckets, in seconds; one more bucket has the longer ones.
LATENCY_BOUNDS: Final = (
    *(0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05),
    *(0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
)
# The operations with latencies, in the order of the rows that count them.
TIMED: Final = (
    *("get", "head", "set", "delete"),
    *("get_bulk", "head_bulk", "set_bulk", "delete_bulk"),
)

MAX_REDIRECTIONS: Final = 16
# The slots of a cluster: CRC16 of a key's hash tag, in 14 bits.
SLOTS: Final = 16384
ASKING: Final = b"*1\r\n$6\r\nASKING\r\n"
# Error codes of a cluster's node that send a command to another node, or to a later moment.
# The fleeting ones may be over by the very next command; a slot that has left stays away.
FLEETING: Final = frozenset(("CLUSTERDOWN", "READONLY", "MASTERDOWN", "LOADING", "BUSY"))
REDIRECTIONS: Final = FLEETING | {"MOVED", "ASK", "TRYAGAIN"}
# Error codes after which a connection is replaced, with the reason: the server is no longer the
# right one, or wants another login.
LEFT_FOR: Final = {
    "READONLY": "the server has become a replica (READONLY)",
    "MASTERDOWN": "the server is a replica that has lost its primary (MASTERDOWN)",
    "NOAUTH": "the server has ended the login (NOAUTH)",
}
# Error codes of a server that does nothing for now, and soon will.
PASSING: Final = frozenset(("LOADING", "BUSY"))
# The pause before such a server is asked again, in seconds: up to the first, doubled up to the
# other.
PUT_OFF_FIRST: Final = 0.02
PUT_OFF_CAP: Final = 0.25

# The guard argument of each record in the set script.
UNGUARDED: Final = b"0"
GUARDED: Final = b"1"
# A repeated guarded write finds its own first attempt and must not take it for another writer's.
GUARDED_REPEAT: Final = b"2"
# Before the version that a write or removal expects; with none behind it, it expects no record.
EXPECTED: Final = b"="
# In its place in a repeat, whose first attempt may have been done and be overwritten since.
EXPECTED_REPEAT: Final = b"~"
OR_NONE: Final = ", or None if there must be no record"

NOT_NEWER: Final = 0
WRITTEN: Final = 1
DAMAGED: Final = -1
# A repeat finds a record that doesn't tell whether its first attempt was done.
UNTOLD: Final = -2

# Replies to TYPE for a key that may hold a record's data.
STRING: Final = b"string"
NO_STRING: Final = (b"none", b"list", b"set", b"zset", b"hash", b"stream")


def has_text(kind: int) -> bool:
    """Return whether the entries of that kind are a Write or Command, with text and a waiter."""
    return SET <= kind <= DELETE_IF or kind >= READ_KEY


def is_write(kind: int) -> bool:
    """Return whether a batch of that kind changes records, or sends messages."""
    return SET <= kind <= DELETE or kind >= WRITE_KEY
