#!lua flags=allow-oom
-- Accepts an estimate whose final usage cannot be learned, and releases the rest of its reservation once.
-- Keys: reservation, account, estimates
-- Args: claim_id
redis.call('ZREM', estimates, claim_id)
local tokens, cost, day, month =
  unpack(redis.call('HMGET', reservation, 'kept_tokens', 'kept_cost', 'day', 'month'))
if tokens then
  redis.call('HDEL', reservation, 'kept_tokens', 'kept_cost')
  change(account, day, 'reserved_tokens', 0 - tokens)
  change(account, day, 'reserved_cost', 0 - cost)
  if month then
    change(account, month, 'reserved_cost', 0 - cost)
  end
end
return 1
