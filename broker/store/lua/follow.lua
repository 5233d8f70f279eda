#!lua flags=allow-oom
-- Reads the status of a session and a part of its journal, and registers a worker whose viewers watch it.
-- Keys: session, events, viewers
-- Args: worker, after (int), max_entries (int), with_spec (int)
-- Constants: WATCH_MS, MAX_BYTES, CHANNELS
-- An empty worker registers none. The events after number after are read.
-- Returns {state or 'gone', worker, end event, end id, end data, last journaled, entries, spec if wanted}.
local reply = status(session)
local last, replayed = unpack(redis.call('HMGET', session, 'last', 'replayed'))
if replayed and redis.call('EXISTS', events) == 0 then
  return {'gone'} -- an end is stored for longer than it can be replayed
end
if reply[1] == 'running' and worker ~= '' then
  local is_new = redis.call('ZADD', viewers, now_ms() + WATCH_MS, worker)
  -- TTL rounds: in a session's last half second it is 0, and EXPIRE by 0 deletes.
  redis.call('PEXPIRE', viewers, math.max(1000, redis.call('PTTL', session)))
  if is_new == 1 then
    notify(CHANNELS, reply[2], 'watched', session)
  end
end
local entries, size, at, ends_at = {}, 0, after, tonumber(last or 0)
while #entries < max_entries and size < MAX_BYTES and at < ends_at do
  local entry = redis.call('XRANGE', events, '1-' .. whole(at + 1), '+', 'COUNT', 1)[1]
  if not entry then
    break
  end
  entries[#entries + 1] = entry
  size = size + #entry[2][4]
  at = tonumber(string.match(entry[1], '%d+$'))
end
reply[6], reply[7] = whole(ends_at), entries
if with_spec == 1 then
  reply[8] = redis.call('HGET', session, 'spec') or ''
end
return reply
