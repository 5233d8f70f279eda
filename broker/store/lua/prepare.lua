-- prepare: (nothing) -> prepared. Stores a session with its prompt.
-- KEYS[1] session; ARGV: seconds to live, then field, value, ...
-- Returns the unix time in ms until which it can be claimed.
local now = redis.call('TIME')
local open_until = now[1] * 1000 + math.floor(now[2] / 1000) + ARGV[1] * 1000
redis.call('HSET', KEYS[1], 'state', 'prepared', 'until', string.format('%.0f', open_until), unpack(ARGV, 2))
redis.call('EXPIRE', KEYS[1], ARGV[1])
return open_until
