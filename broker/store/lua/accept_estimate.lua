#!lua flags=allow-oom
-- The final usage behind an estimate cannot be learned. The estimate stands, and what stayed reserved above it is given
-- back, once.
-- Keys: reservation, account, estimates
-- Args: claim_id
redis.call('ZREM', estimates, claim_id)
local tokens, cost, day = unpack(redis.call('HMGET', reservation, 'kept_tokens', 'kept_cost', 'day'))
if tokens then
  redis.call('HDEL', reservation, 'kept_tokens', 'kept_cost')
  change(account, day, 'reserved_tokens', 0 - tokens)
  change(account, day, 'reserved_cost', 0 - cost)
end
return 1
