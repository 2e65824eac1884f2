"""What happens on the server in one step: the Lua scripts, and why no message is lost.

A message is always in one of two places: in a list of its queue, or registered as unacked, which
is a field of the hash ``unacked`` with the time at which it was taken in ``unacked_index``.  Kombu
pops with BRPOP and registers afterwards; a client that dies in between takes the message along.
Here the server does both in one script.  The rules that every script keeps:

1. *Register, then pop; push, then forget.*  A script copies a message to where it goes, and takes
   it away from where it was only afterwards.  Whatever fails in between (no memory, a key of the
   wrong type, a command that the user may not use) leaves the message where it was; at worst it
   is in both places, and delivered twice.
2. *One pop, one token.*  Each time that a message is taken it gets a token of its own, made of the
   client's name and a number that the client counts.  An acknowledgement that comes too late,
   after the message was given to another consumer, is one for a token that is gone.  So
   acknowledging is idempotent, and may be repeated after an error.
3. *Nothing is parsed.*  A payload is wrapped as ``[payload, "", "queue"]``, byte by byte, which
   Kombu 5.7 restores to that one queue.  (Lua's JSON makes ``{}`` of ``[]`` and rounds large
   integers.)
4. *The server's clock.*  Times are those of the server, in seconds since 1970 as Kombu's are.

A client that dies leaves its tokens in ``unacked_index``.  Living clients renew theirs, and any
client puts back what was not renewed within the visibility timeout (`RETURN`, which looks at the
time again in the same step).  So every message is acknowledged, in a list, or comes back to one.

Waiting.  A consumer that found nothing becomes one of two *watchers* of the queue, or is *parked*.
A watcher has the server track the lists (CLIENT TRACKING) and looks whether they exist, in this
order and after it was entered; so a push either is seen by that look or is told by an invalidation
message, to two clients, however many wait.  One of them takes the message and looks in the same
breath; the other, if it came too late the last time, waits a moment and only looks.  Who takes a
message and leaves some, or leaves no watcher behind, wakes parked consumers; PUBLISH tells how many
heard it, so the gone are passed over.  Who has work already when it finds the queue empty leaves
the watching to one that is parked; so messages go round among those that are idle, also where no
prefetch limit is set.  Who would be parked looks first whether the watchers still hear their wakes,
so the killed do not delay those who come after them.  A watcher also has a lease, which it has to
renew; parked consumers look now and then whether there is a vacancy.  What can go wrong here costs
time, never a message.

Redis 7.0 tracks all keys of an EVAL.  Therefore the tracked look is a command of its own.

Needs Redis 5 (scripts that write after TIME).  KEYS and ARGV stand above each script.
"""

from __future__ import annotations

import hashlib

__all__ = ["COPY", "LEAVE", "POP", "RENEW", "RENEW_WATCH", "RETURN", "SWEEP", "UNLOCK", "Script"]


class Script:
    """A script, and the digest by which EVALSHA calls it."""

    __slots__ = ("digest", "text")

    def __init__(self, *parts: str) -> None:
        self.text = "\n".join(part.strip("\n") for part in parts).encode()
        self.digest = hashlib.sha1(self.text, usedforsecurity=False).hexdigest().encode()


# The time as "seconds.microseconds", exact, and as a number.
_NOW = """
local t = redis.call('TIME')
local score = t[1] .. string.format('.%06d', tonumber(t[2]))
local now = tonumber(score)
"""

# A first write that changes nothing fails if a key has the wrong type, before anything has moved.
# From then on the server no longer refuses commands for want of memory, so messages can be
# taken off a full server.
_CHECK = """
redis.call('HDEL', KEYS[1], '')
redis.call('ZREM', KEYS[2], '')
"""

# Wakes up to `count` parked consumers. A member is "client/number of the consumer".
_WAKE = """
local function wake(parked, channel, count)
  while count > 0 do
    local next = redis.call('ZPOPMIN', parked)
    if #next == 0 then return end
    local client, number = string.match(next[1], '^(.-)/(.*)$')
    if client and redis.call('PUBLISH', channel .. client, number) > 0 then count = count - 1 end
  end
end
"""

# Removes watchers that are gone, and those of the parked who have waited longest: whoever lives
# hears its wake channel. (A user who may not ask is told by the leases alone.)
_BURY = """
local function is_gone(member, channel)
  local client = string.match(member, '^(.-)/')
  local heard = redis.pcall('PUBSUB', 'NUMSUB', channel .. (client or ''))
  return not heard.err and heard[2] == 0
end
local function bury(watchers, parked, channel)
  for _, member in ipairs(redis.call('ZRANGE', watchers, 0, -1)) do
    if is_gone(member, channel) then redis.call('ZREM', watchers, member) end
  end
  for _, member in ipairs(redis.call('ZRANGE', parked, 0, 99)) do
    if not is_gone(member, channel) then return end
    redis.call('ZREM', parked, member)
  end
end
"""

# Takes messages.
# KEYS: unacked, index, watchers, parked, list...
# ARGV: most messages, most bytes, token prefix, number of the first token, tail, consumer
#       (empty: it does not wait here), seconds of a lease, most watchers, wake channel, whether
#       it has work already (1: it leaves watching to those who wait)
# Returns: state (0: has what it asked for, or does not wait; 1: watcher; 2: parked), number of
#          parked consumers if it is parked, then for each list how many were taken, then the
#          payloads in order. State 3: what is about waiting was refused (a user who may not
#          PUBLISH); messages that were taken are told all the same. A message that is larger than
#          the most bytes comes alone, and as the number of its bytes: see `COPY`.
# A call costs half a microsecond or more, so a list's messages are registered by two calls. The
# sizes decide how many there are, so they are looked at one by one.
POP = Script(
    _WAKE,
    _BURY,
    _NOW,
    """
local most, room, number = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[4])
local prefix, tail, me, lease = ARGV[3], ARGV[5], ARGV[6], ARGV[7]
local found, size = 0, 0
local reply = {0, 0}
local lists = #KEYS - 4
for i = 1, lists do
  local key, taken = KEYS[i + 4], 0
  local kept, index = {}, {}
  while found < most and size < room do
    local raw = redis.pcall('LINDEX', key, -1 - taken)
    if not raw then break end
    if raw.err then
      if found == 0 then return raw end
      most = found  -- tell of what was taken; the error comes with the next call
      break
    end
    size = size + #raw
    if found > 0 and size > room then break end
    local token = prefix .. string.format('%.0f', number + found)
    found = found + 1
    taken = taken + 1
    reply[lists + 2 + found] = size > room and #raw or raw
    kept[2 * taken - 1] = token
    kept[2 * taken] = '[' .. raw .. tail
    index[2 * taken - 1] = score
    index[2 * taken] = token
  end
  reply[i + 2] = taken
  if taken > 0 then
    if taken == found then
      redis.call('HDEL', KEYS[1], '')
      redis.call('ZREM', KEYS[2], '')
    end
    redis.call('HSET', KEYS[1], unpack(kept))
    redis.call('ZADD', KEYS[2], unpack(index))
    redis.call('LTRIM', key, 0, -1 - taken)
  end
end
if me == '' then return reply end
local function wait()
  local full = found >= most or size >= room
  if not full and ARGV[10] == '1' then
    local others = redis.call('ZCARD', KEYS[4])
    if redis.call('ZSCORE', KEYS[4], me) then others = others - 1 end
    if others > 0 then
      redis.call('ZREM', KEYS[3], me)
      redis.call('ZADD', KEYS[4], score, me)
      redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', '(' .. score)
      if redis.call('ZCARD', KEYS[3]) < tonumber(ARGV[8]) then wake(KEYS[4], ARGV[9], 1) end
      reply[1] = 2
      reply[2] = others + 1
      return
    end
  end
  local till = redis.call('ZSCORE', KEYS[3], me)
  if not full and till and tonumber(till) > now + lease / 2 then
    reply[1] = 1
    return
  end
  redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', '(' .. score)
  if not full and redis.call('ZCARD', KEYS[3]) >= tonumber(ARGV[8]) then
    bury(KEYS[3], KEYS[4], ARGV[9])
  end
  if not full and (till and tonumber(till) >= now
      or redis.call('ZCARD', KEYS[3]) < tonumber(ARGV[8])) then
    redis.call('ZADD', KEYS[3], string.format('%.6f', now + lease), me)
    redis.call('EXPIRE', KEYS[3], 2 * math.ceil(lease))
    redis.call('ZREM', KEYS[4], me)
    reply[1] = 1
  elseif not full then
    redis.call('ZADD', KEYS[4], score, me)
    redis.call('EXPIRE', KEYS[4], 86400)
    reply[1] = 2
    reply[2] = redis.call('ZCARD', KEYS[4])
  else
    redis.call('ZREM', KEYS[3], me)
    redis.call('ZREM', KEYS[4], me)
    if redis.call('EXISTS', unpack(KEYS, 5)) > 0 then
      wake(KEYS[4], ARGV[9], 2)
    elseif redis.call('ZCARD', KEYS[3]) == 0 then
      wake(KEYS[4], ARGV[9], 1)
    end
  end
end
if not pcall(wait) then reply[1] = 3 end
return reply
""",
)

# Copies a large message to where GETRANGE can read parts of it, as HGET cannot.
# KEYS: unacked, the copy
# ARGV: token, seconds for which the copy is kept
# Returns: 1; 0 if the message is no longer unacked.
COPY = Script(
    """
redis.call('HDEL', KEYS[1], '')  -- a full server goes on after a first write
local kept = redis.call('HGET', KEYS[1], ARGV[1])
if not kept then return 0 end
redis.call('SET', KEYS[2], kept, 'EX', ARGV[2])
return 1
""",
)

# A consumer no longer waits, or cannot take what it was woken for: the next one.
# KEYS: watchers, parked, list...
# ARGV: consumer, wake channel
LEAVE = Script(
    _WAKE,
    _NOW,
    """
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', '(' .. score)
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
if redis.call('EXISTS', unpack(KEYS, 3)) > 0 or redis.call('ZCARD', KEYS[1]) == 0 then
  wake(KEYS[2], ARGV[2], 1)
end
""",
)

# Renews the leases of watchers.
# KEYS: watchers...
# ARGV: seconds of a lease, then the consumer for each key
# Returns: for each key 1 if it is still a watcher.
RENEW_WATCH = Script(
    _NOW,
    """
redis.call('ZREM', KEYS[1], '')  -- a full server goes on after a first write
local reply = {}
local till = string.format('%.6f', now + ARGV[1])
for i = 1, #KEYS do
  if redis.call('ZSCORE', KEYS[i], ARGV[i + 1]) then
    redis.call('ZADD', KEYS[i], till, ARGV[i + 1])
    redis.call('EXPIRE', KEYS[i], 2 * math.ceil(ARGV[1]))
    reply[i] = 1
  else
    reply[i] = 0
  end
end
return reply
""",
)

# Renews the leases of messages that a living client holds, and tells which visibility timeouts are
# in use: each client enters its own in a set beside the index.
# KEYS: index, fleet, since
# ARGV: own visibility timeout, seconds for which that entry holds, token...
# Returns: the longest visibility timeout in use, the shortest, and for how many seconds this
#          client's was never out of use, as texts.
RENEW = Script(
    _NOW,
    """
redis.call('ZREM', KEYS[1], '')  -- a full server goes on after a first write
for i = 3, #ARGV do redis.call('ZADD', KEYS[1], 'XX', score, ARGV[i]) end
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', '(' .. score)
local longest, shortest = tonumber(ARGV[1]), tonumber(ARGV[1])
for _, other in ipairs(redis.call('ZRANGE', KEYS[2], 0, 99)) do
  longest = math.max(longest, tonumber(other) or 0)
  shortest = math.min(shortest, tonumber(other) or shortest)
end
local entry, till = redis.call('ZSCORE', KEYS[2], ARGV[1]), now + ARGV[2]
if not entry then
  redis.call('HSET', KEYS[3], ARGV[1], score)
  redis.call('EXPIRE', KEYS[3], 86400)
end
if till > tonumber(entry or 0) then
  redis.call('ZADD', KEYS[2], string.format('%.6f', till), ARGV[1])
  redis.call('EXPIRE', KEYS[2], 86400)
end
local since = tonumber(redis.call('HGET', KEYS[3], ARGV[1]) or 0)
return {tostring(longest), tostring(shortest), string.format('%.6f', now - since)}
""",
)

# Begins to look for messages of clients that are gone.
# KEYS: mutex, index
# ARGV: name of who looks, milliseconds for which the mutex holds, visibility timeout, most messages
# Returns: the time before which a message counts as lost, then tokens, the newest first: each is
#          put at the head of its queue, so the oldest is the next to be served. Nothing if
#          somebody else looks, or if there are none (then the mutex is free again).
SWEEP = Script(
    _NOW,
    """
redis.call('ZREM', KEYS[2], '')  -- a full server goes on after a first write
local held = redis.call('GET', KEYS[1])
if held and held ~= ARGV[1] then return {} end
local before = string.format('%.6f', now - ARGV[3])
local tokens = redis.call('ZREVRANGEBYSCORE', KEYS[2], '(' .. before, '-inf', 'LIMIT', 0, ARGV[4])
if #tokens == 0 then
  if held then redis.call('DEL', KEYS[1]) end
  return {}
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
table.insert(tokens, 1, before)
return tokens
""",
)

# Ends that.
# KEYS: mutex
# ARGV: name of who looked
UNLOCK = Script(
    """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
""",
)

# Puts an unacked message back.
# KEYS: unacked, index, list...
# ARGV: token, time before which it must have been taken (empty: whenever), length of the tail, then
#       the payload (empty: as it was taken), and LPUSH to put it at the end of the line
# Returns: 1; 0 if it is no longer unacked, or was renewed.
RETURN = Script(
    _CHECK,
    """
if ARGV[2] ~= '' then
  local taken = redis.call('ZSCORE', KEYS[2], ARGV[1])
  if not taken or tonumber(taken) >= tonumber(ARGV[2]) then return 0 end
end
local kept = redis.call('HGET', KEYS[1], ARGV[1])
if not kept then
  redis.call('ZREM', KEYS[2], ARGV[1])
  return 0
end
local raw = ARGV[4]
if raw == '' then raw = string.sub(kept, 2, #kept - ARGV[3]) end
for i = 3, #KEYS do redis.call(ARGV[5] or 'RPUSH', KEYS[i], raw) end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
return 1
""",
)
