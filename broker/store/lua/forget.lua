#!lua flags=allow-oom
-- forget: a prepared session waits no more.
-- KEYS[1] the client's waiting sessions, [2] their bytes and total, [3] all waiting sessions, [4] their bytes and total
-- ARGV: session
-- Returns 1 if it was waiting, else 0.
local waited = 0
for i = 1, 3, 2 do
  local size = redis.call('HGET', KEYS[i + 1], ARGV[1])
  if size then
    redis.call('HDEL', KEYS[i + 1], ARGV[1])
    redis.call('HINCRBY', KEYS[i + 1], 'total', string.format('%d', 0 - size))
  end
  waited = math.max(waited, redis.call('ZREM', KEYS[i], ARGV[1]))
end
return waited
