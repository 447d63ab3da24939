"""What must be atomic in Redis, as Lua; one prologue, one epilogue, and one short middle per operation.

A tenant's record is a hash: `epoch`, `generation`, `revision`, `reads`, `invalidated_at`, `snapshot`, `failure`, and
the bucket as `level`, `level_at`. Instants are microseconds on the Redis server's own clock (TIME), counts are decimal
text: Lua's numbers hold both exactly, its default formatting does not.

How a generation stays monotonic though Redis forgets
    A record is born with a random *epoch*. Whoever calls says which epoch, generation and revision it knows. A record
    of another epoch whose generation is not higher, or of the same epoch that went back, has lost writes (FLUSHALL, an
    empty restart, a failover): perhaps an invalidation among them. So its generation is raised above everything that
    the caller knows. For every member the number only rises, and a lost invalidation is repeated, never dropped.

`revision` is the server's time at the last change, or one more than the last, so that a record which was lost and
written anew is later than what anybody remembers.

Works on Redis >= 6.2 and Valkey: TIME before writes needs effects replication (Redis >= 5), XTRIM MINID needs 6.2.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

__all__ = [
    "ACQUIRE",
    "APPEND",
    "DELIVER",
    "FAIL",
    "HISTORY",
    "INVALIDATE",
    "MEMBERS",
    "NOW",
    "PUT",
    "RELEASE",
    "REPORT",
    "STAMPS",
    "TOUCH",
    "Script",
]


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script and the name by which Redis remembers it."""

    text: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()
        object.__setattr__(self, "sha", sha)


_CLOCK = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local function whole(number) return string.format('%.0f', number) end
"""

# KEYS: record, lease. ARGV: tenant, channel, member, life in ms, a new epoch, the epoch known, the generation known,
# the revision known, the reads known, whether an invalidation is owed, a snapshot offered; then the operation's own.
_OPEN = (
    _CLOCK
    + """
local had = redis.call('HMGET', KEYS[1],
  'epoch', 'generation', 'revision', 'reads', 'invalidated_at', 'snapshot', 'failure')
local epoch = had[1] or ARGV[5]
local generation = tonumber(had[2] or 0)
local revision = tonumber(had[3] or 0)
local reads = math.max(tonumber(had[4] or 0), tonumber(ARGV[9]))
local invalidated_at = had[5] or ''
local snapshot = had[6] or ''
local failure = had[7] or ''
local was = revision
local dirty = not had[1]
local raised = false

local function raise()
  if not raised then
    generation = math.max(generation, tonumber(ARGV[7])) + 1
    invalidated_at = whole(now)
    raised = true
    dirty = true
  end
end

local function supersedes(ours, theirs)
  if theirs == '' then return true end
  ours, theirs = cjson.decode(ours), cjson.decode(theirs)
  if ours.generation < theirs.generation then return false end
  local mine, yours = tonumber(ours.updated_at), tonumber(theirs.updated_at)
  if mine and yours and mine ~= yours then return mine > yours end
  return ours.read_at > theirs.read_at
end

local lost = generation < tonumber(ARGV[7])
if ARGV[6] ~= '' then
  if epoch ~= ARGV[6] then
    lost = generation <= tonumber(ARGV[7])
  else
    lost = lost or revision < tonumber(ARGV[8])
  end
end
if lost or ARGV[10] == '1' then raise() end
if ARGV[11] ~= '' and supersedes(ARGV[11], snapshot) then
  snapshot = ARGV[11]
  failure = ''
  dirty = true
end
local outcome = {}
"""
)

_CLOSE = """
if dirty then
  revision = math.max(now, revision + 1, tonumber(ARGV[8]) + 1)
  redis.call('HSET', KEYS[1], 'epoch', epoch, 'generation', whole(generation), 'revision', whole(revision),
    'reads', whole(reads), 'invalidated_at', invalidated_at, 'snapshot', snapshot, 'failure', failure)
end
redis.call('PEXPIRE', KEYS[1], ARGV[4])
local record = {whole(now), epoch, whole(generation), whole(revision), whole(reads), invalidated_at, snapshot, failure,
  whole(was)}
if dirty then redis.call('PUBLISH', ARGV[2], cjson.encode({ARGV[3], ARGV[1], record})) end
return {record, outcome}
"""

# The lease's value is its number and a word of the call that took it: a call that the client repeats finds its own.
_LEASE = """
local function holder()
  local held = redis.call('GET', KEYS[2])
  if not held then return nil end
  local number, word = string.match(held, '^(%d+):(.*)$')
  return tonumber(number), word
end
"""

_END = (
    _LEASE
    + """
local number = tonumber(ARGV[12])
local latest = reads == number
if latest and holder() == number then redis.call('DEL', KEYS[2]) end
"""
)


def _operation(middle: str) -> Script:
    return Script(_OPEN + middle + _CLOSE)


TOUCH = _operation("")
"""The record as it stands, once lost writes are repaired, owed invalidations are paid and offers are judged."""

INVALIDATE = _operation("raise()\n")
"""Raise the generation."""

DELIVER = _operation(
    """
if redis.call('SET', KEYS[3], '1', 'NX', 'PX', ARGV[12]) then
  raise()
  outcome = {'1'}
else
  outcome = {'0'}
end
"""
)
"""Raise the generation unless the delivery id of KEYS[3] is known. ARGV: its life in ms. Gives 1, or 0 if known."""

# ARGV: the lease's life in ms, its word, whether it is metered, the bucket's burst, its rate a second
ACQUIRE = _operation(
    _LEASE
    + """
local number, word = holder()
if number and word == ARGV[13] then
  outcome = {'lease', whole(number)}
elseif number then
  outcome = {'busy', whole(number), whole(math.max(0, redis.call('PTTL', KEYS[2])))}
else
  local wait = 0
  if ARGV[14] == '1' then
    local burst, rate = tonumber(ARGV[15]), tonumber(ARGV[16])
    local bucket = redis.call('HMGET', KEYS[1], 'level', 'level_at')
    local elapsed = math.max(0, now - tonumber(bucket[2] or now)) / 1000000
    local level = math.min(burst, tonumber(bucket[1] or burst) + elapsed * rate)
    if level >= 1 then level = level - 1 else wait = (1 - level) / rate end
    redis.call('HSET', KEYS[1], 'level', string.format('%.17g', level), 'level_at', whole(now))
  end
  if wait > 0 then
    outcome = {'metered', string.format('%.17g', wait)}
  else
    reads = reads + 1
    redis.call('HSET', KEYS[1], 'reads', whole(reads))
    redis.call('SET', KEYS[2], whole(reads) .. ':' .. ARGV[13], 'PX', ARGV[12])
    outcome = {'lease', whole(reads)}
  end
end
"""
)
"""Take the lease. Gives (lease, number), (busy, number, ms left) or (metered, seconds to wait)."""

PUT = _operation(
    _END
    + """
if latest and generation == tonumber(ARGV[13]) then
  snapshot = ARGV[14]
  failure = ''
  dirty = true
  outcome = {'1'}
else
  outcome = {'0'}
end
"""
)
"""Store a snapshot, end the lease. ARGV: the lease's number and generation, the snapshot. Gives 1; 0 if fenced off."""

FAIL = _operation(
    _END
    + """
if latest and generation == tonumber(ARGV[13]) then
  failure = ARGV[14]
  dirty = true
  outcome = {'1'}
else
  outcome = {'0'}
end
"""
)
"""Store a failure, end the lease. ARGV: the lease's number and generation, the failure. Gives 1; 0 if fenced off."""

RELEASE = _operation(_END + "if latest then dirty = true end\n")
"""End the lease without a result; the record counts as changed, so that whoever waits looks again. ARGV: its number."""

NOW = Script(_CLOCK + "return whole(now)")
"""The server's clock, on the node that keeps KEYS[1]."""

STAMPS = Script(
    _CLOCK
    + """
local differing = {}
for index, key in ipairs(KEYS) do
  local had = redis.call('HMGET', key, 'epoch', 'generation', 'revision')
  local stamp = had[1] and had[2] and had[3] and had[1] .. ' ' .. had[2] .. ' ' .. had[3] or ''
  if stamp ~= ARGV[index] then
    differing[#differing + 1] = whole(index - 1)
    differing[#differing + 1] = stamp
  end
end
return {whole(now), differing}
"""
)
"""Which of the records KEYS have another stamp than is known. ARGV: the stamps known. Gives the time, and place and
stamp of each that differs: in a fleet that is in step, next to nothing."""

APPEND = Script(
    _CLOCK
    + """
redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[1], '*', 'event', ARGV[3])
redis.call('XTRIM', KEYS[1], 'MINID', '~', whole(math.max(0, now / 1000 - ARGV[2])))
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return {}
"""
)
"""Add a row to the history of KEYS[1]. ARGV: the most rows, the longest life in ms, the row."""

HISTORY = Script("return redis.call('XREVRANGE', KEYS[1], ARGV[1], '-', 'COUNT', ARGV[2])")
"""Rows of history, newest first. ARGV: the id to begin with, the most rows."""

REPORT = Script(
    _CLOCK
    + """
local stamp = whole(now / 1000)
redis.call('ZADD', KEYS[1], stamp, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', '(' .. whole(now / 1000 - ARGV[3]))
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
return {}
"""
)
"""Remember a member: KEYS index, its report. ARGV: its name, its report, its life in ms."""

MEMBERS = Script(
    _CLOCK
    + """
local since = whole(now / 1000 - ARGV[1])
return {whole(now / 1000), redis.call('ZRANGEBYSCORE', KEYS[1], since, '+inf', 'WITHSCORES')}
"""
)
"""The names of living members and when each was heard of, in ms. ARGV: the life of a report in ms."""
