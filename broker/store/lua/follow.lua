#!lua flags=allow-oom
-- follow: reads where a session stands and what its journal holds, and registers a worker whose viewers watch it.
-- KEYS[1] session, [2] events, [3] viewers
-- ARGV: worker ('' registers nobody), ms that the registration holds, number after which to read, entries at most,
--       bytes after which to stop, prefix of the bells
-- Returns {state or 'gone', worker, end event, end id, end data, last journaled, entries}.
local got = redis.call('HMGET', KEYS[1], 'state', 'worker', 'end_event', 'end_id', 'end_data', 'last', 'replayed')
if not got[1] or got[7] and redis.call('EXISTS', KEYS[2]) == 0 then
  return {'gone'}  -- an end is known for longer than it can be replayed
end
if got[1] == 'running' and ARGV[1] ~= '' then
  local now = redis.call('TIME')
  local fresh = redis.call('ZADD', KEYS[3], now[1] * 1000 + math.floor(now[2] / 1000) + ARGV[2], ARGV[1])
  -- TTL rounds: in a session's last half second it is 0, and EXPIRE by 0 deletes.
  redis.call('PEXPIRE', KEYS[3], math.max(1000, redis.call('PTTL', KEYS[1])))
  if fresh == 1 then
    redis.pcall('PUBLISH', ARGV[6] .. got[2], 'watched ' .. string.match(KEYS[1], '{(.-)}'))
  end
end
local entries, size, at, last = {}, 0, tonumber(ARGV[3]), tonumber(got[6] or 0)
while #entries < tonumber(ARGV[4]) and size < tonumber(ARGV[5]) and at < last do
  local entry = redis.call('XRANGE', KEYS[2], '1-' .. string.format('%.0f', at + 1), '1', 'COUNT', 1)[1]
  if not entry then
    break
  end
  entries[#entries + 1] = entry
  size = size + #entry[2][4]
  at = tonumber(string.match(entry[1], '%d+$'))
end
return {got[1], got[2] or '', got[3] or '', got[4] or '', got[5] or '', got[6] or '0', entries}
