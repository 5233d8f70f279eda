#!lua flags=allow-oom
-- release: gives an open reservation back; nothing was spent. The record stays, so that a late reserve changes nothing.
-- KEYS[1] reservation, [2] the client's slots, [3] the client's account, [4] everyone's account, [5] all open ones
-- ARGV: token, seconds to keep the record
local state, tokens, cost, day = unpack(redis.call('HMGET', KEYS[1], 'state', 'tokens', 'cost', 'day'))
if state == 'open' then
  -- `0 - x`, for Lua has a negative zero: `-x` of 0 is '-0', which Redis (7.0) does not take for an integer.
  for _, account in ipairs({KEYS[3], KEYS[4]}) do
    redis.call('HINCRBY', account, day .. ':reserved_tokens', string.format('%.0f', 0 - tokens))
    redis.call('HINCRBY', account, day .. ':reserved_cost', string.format('%.0f', 0 - cost))
  end
end
if state == 'open' or not state then
  redis.call('HSET', KEYS[1], 'state', 'released')
  redis.call('EXPIRE', KEYS[1], ARGV[2])
end
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZREM', KEYS[5], ARGV[1])
return 1
