#!lua flags=allow-oom
-- Reads the marker that all workers know, and makes it if there is none. It must also work in a full Redis. Registers
-- the worker that asks among those that live, and removes those that have not asked for a while.
-- Keys: marker, wiped, alive
-- Args: new_marker, worker
-- Constants: MARKER_S, ALIVE_MS
-- Returns {marker, 1 if a worker has noticed in the last seconds that Redis came back empty, the time in ms}.
redis.call('SET', marker, new_marker, 'NX')
local now = now_ms()
redis.call('ZADD', alive, whole(now), worker)
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', alive, '-inf', whole(now - ALIVE_MS))) do
  redis.call('ZREM', alive, gone)
end
redis.call('PEXPIRE', alive, ALIVE_MS)
return {redis.call('GETEX', marker, 'EX', MARKER_S), redis.call('EXISTS', wiped), whole(now)}
