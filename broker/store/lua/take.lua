#!lua flags=allow-oom
-- take: estimates whose truth somebody should have asked for by now, each for one caller alone for a while.
-- KEYS[1] estimates, by the time in ms from which anybody may ask
-- ARGV: how many at most, ms that they are the caller's
-- Returns the time in ms and their tokens.
local now = redis.call('TIME')
local ms = now[1] * 1000 + math.floor(now[2] / 1000)
local tokens = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ms, 'LIMIT', 0, ARGV[1])
for _, token in ipairs(tokens) do
  redis.call('ZADD', KEYS[1], ms + ARGV[2], token)
end
return {ms, tokens}
