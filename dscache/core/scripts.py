"""The Lua script of guarded writes and removals, and its SHA1."""

from __future__ import annotations

import hashlib
from typing import Final

# KEYS: _v, _d of each record. ARGV: version, data of each record; behind these the ttl of all in
# seconds, 0 for none or -1 for what is left, and the guard of all. If they differ between records,
# each has its own behind its data. Without data, the record is removed. A command has guards for
# all its records or for none, and no name twice. The answer is 1 if all were written or removed,
# else that of each record.
# A call of a command costs the script as much as all else for a record. So one MGET reads the
# versions, one EXISTS finds that expected records have their data, and one MSET writes what has no
# ttl. Each further text costs it a tenth of MSET. Only records of which these don't show that the
# guard holds are looked at one by one. An anchored pattern finds that all versions are digits in a
# third of the time of a search for something else.
# EXISTS doesn't see that data is a list, for instance, and no text. Such data is then overwritten,
# as by any other write.
# A server may refuse a command to the script alone, since the user lacks the right to it. If that
# raised behind a write, the write would be reported as refused. So a refused question is the answer
# of its record, and a refused MSET is done by SET. An unknown command is named in its error, which
# Redis doesn't do.
# Lua's numbers are doubles and lose versions beyond 2^53, so versions are compared as text.
# Lifetimes end at a point in time that is computed once: of two SET ... EX in a script, Redis
# 7.0 lets every 400th pair expire at different milliseconds.
SET_SCRIPT: Final = b"""
local answers = {}
local now
local function named(reply, command)
  if string.find(reply.err, 'nknown') then reply.err = reply.err .. ': ' .. command end
  return reply
end
local function expiry(ttl)
  if not now then
    local time = redis.pcall('TIME')
    if time.err then return named(time, 'TIME') end
    now = time[1] * 1000 + math.floor(time[2] / 1000)
  end
  return string.format('%.0f', now + ttl * 1000)
end
local function present(key)
  local length = redis.pcall('STRLEN', key)
  if type(length) == 'table' then
    return not string.find(length.err, 'WRONGTYPE', 1, true) and named(length, 'STRLEN')
  end
  if length > 0 then return true end
  local found = redis.pcall('EXISTS', key)
  return type(found) == 'table' and named(found, 'EXISTS') or found == 1
end
local function check(k, version, data, guard)
  local stored = redis.pcall('GET', KEYS[k])
  if type(stored) == 'table' then return named(stored, 'GET') end
  local mode, expected = string.sub(guard, 1, 1), string.sub(guard, 2)
  local there = stored and present(KEYS[k + 1])
  if type(there) == 'table' then return there end
  if not there then
    if mode == '~' then return -2 end
    return (mode ~= '=' or expected == '') and 1 or 0
  end
  local digits = string.match(stored, '^0*(%d+)$')
  if not digits or #digits > 19 or (#digits == 19 and digits > '9223372036854775807') then
    return -1
  end
  if mode == '=' then return digits == expected and 1 or 0 end
  if mode == '~' then
    local own = data ~= '' and digits == version
    if own and redis.call('GET', KEYS[k + 1]) == data then return 1 end
    return (digits == expected and not own) and 1 or -2
  end
  if #digits < #version or (#digits == #version and digits < version) then return 1 end
  if guard == '2' and digits == version and redis.call('GET', KEYS[k + 1]) == data then
    return 1
  end
  return 0
end
local keys, arguments = KEYS, ARGV
local records = #keys / 2
local each = #arguments == #keys + 2 and 2 or 4
local ttl, guard = arguments[#arguments - 1], arguments[#arguments]
local stored = {}
local plain = false
if guard ~= '0' then
  for i = 1, records do stored[i] = keys[2 * i - 1] end
  stored = redis.pcall('MGET', unpack(stored))
  local all, text = pcall(table.concat, stored)
  plain = not stored.err and all and string.find(text, '^%d+$')
end
local are_whole
local function whole()
  if are_whole == nil then
    local data_keys = {}
    for i = 1, records do data_keys[i] = keys[2 * i] end
    are_whole = redis.pcall('EXISTS', unpack(data_keys)) == records
  end
  return are_whole
end
local parts, n = {}, 0
for i = 1, records do
  local k, a = 2 * i - 1, each * (i - 1) + 1
  local version, data = arguments[a], arguments[a + 1]
  if each == 4 then ttl, guard = arguments[a + 2], arguments[a + 3] end
  local answer = 1
  if guard ~= '0' then
    local old, holds = stored[i], false
    if plain and old ~= '' then
      if guard == '1' or guard == '2' then
        holds = #old < #version or (#old == #version and old < version)
      else
        holds = guard == '=' .. old and whole()
      end
    end
    if not holds then
      answer = check(k, version, data, guard)
      if answer ~= 1 then answers[i] = answer end
    end
  end
  if answer == 1 then
    local at
    if ttl == '-1' then
      at = redis.pcall('PEXPIRETIME', keys[k])
      if type(at) == 'table' then
        at = named(at, 'PEXPIRETIME')
      else
        at = at > 0 and string.format('%.0f', at)
      end
    elseif ttl ~= '0' then
      at = expiry(ttl)
    end
    if type(at) == 'table' then
      answers[i] = at
    elseif data == '' then
      redis.call('DEL', keys[k], keys[k + 1])
    elseif not at then
      parts[n + 1], parts[n + 2], parts[n + 3], parts[n + 4] = keys[k], version, keys[k + 1], data
      n = n + 4
    else
      redis.call('SET', keys[k], version, 'PXAT', at)
      redis.call('SET', keys[k + 1], data, 'PXAT', at)
    end
  end
end
if n > 0 and redis.pcall('MSET', unpack(parts)).err then
  for i = 1, n, 2 do redis.call('SET', parts[i], parts[i + 1]) end
end
if not next(answers) then return 1 end
for i = 1, records do answers[i] = answers[i] or 1 end
return answers
"""


SET_SCRIPT_SHA: Final = hashlib.sha1(SET_SCRIPT, usedforsecurity=False).hexdigest().encode()
