#!lua flags=allow-oom
-- asked: the truth behind an estimate is not to be had, so the estimate stands, and what stayed reserved above it is
-- given back, once.
-- KEYS[1] reservation, [2] the client's account, [3] everyone's account, [4] estimates whose truth is still asked for
-- ARGV: token
redis.call('ZREM', KEYS[4], ARGV[1])
local tokens, cost, day = unpack(redis.call('HMGET', KEYS[1], 'kept_tokens', 'kept_cost', 'day'))
if tokens and redis.call('HDEL', KEYS[1], 'kept_tokens', 'kept_cost') > 0 then
  for _, account in ipairs({KEYS[2], KEYS[3]}) do
    redis.call('HINCRBY', account, day .. ':reserved_tokens', string.format('%.0f', 0 - tokens))
    redis.call('HINCRBY', account, day .. ':reserved_cost', string.format('%.0f', 0 - cost))
  end
end
return 1
