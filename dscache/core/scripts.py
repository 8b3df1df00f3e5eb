"""The Lua script of guarded writes and removals, and its SHA1."""

from __future__ import annotations

import hashlib
from typing import Final

# KEYS: _v, _d of each record. ARGV: version, data, ttl in seconds or 0, guard. Without data, the
# record is removed.
# Lua's numbers are doubles and lose versions beyond 2^53, so versions are compared as text.
# Lifetimes end at a point in time that is computed once: of two SET ... EX in a script, Redis
# 7.0 lets every 400th pair expire at different milliseconds.
SET_SCRIPT: Final = b"""
local answers = {}
local now
local function expiry(ttl)
  if not now then
    local time = redis.call('TIME')
    now = time[1] * 1000 + math.floor(time[2] / 1000)
  end
  return string.format('%.0f', now + ttl * 1000)
end
local function present(key)
  local length = redis.pcall('STRLEN', key)
  return type(length) == 'number' and (length > 0 or redis.call('EXISTS', key) == 1)
end
local function check(k, version, data, guard)
  local stored = redis.pcall('GET', KEYS[k])
  if type(stored) == 'table' then return stored end
  local mode, expected = string.sub(guard, 1, 1), string.sub(guard, 2)
  if not stored or not present(KEYS[k + 1]) then
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
for k = 1, #KEYS, 2 do
  local a = 2 * k - 1
  local version, data, ttl, guard = ARGV[a], ARGV[a + 1], ARGV[a + 2], ARGV[a + 3]
  local answer = 1
  if guard ~= '0' then answer = check(k, version, data, guard) end
  if answer == 1 then
    if data == '' then
      redis.call('DEL', KEYS[k], KEYS[k + 1])
    elseif ttl == '0' then
      redis.call('MSET', KEYS[k], version, KEYS[k + 1], data)
    else
      local at = expiry(ttl)
      redis.call('SET', KEYS[k], version, 'PXAT', at)
      redis.call('SET', KEYS[k + 1], data, 'PXAT', at)
    end
  end
  answers[(k + 1) / 2] = answer
end
return answers
"""


SET_SCRIPT_SHA: Final = hashlib.sha1(SET_SCRIPT, usedforsecurity=False).hexdigest().encode()
