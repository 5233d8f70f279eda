#!lua flags=allow-oom
-- Releases an open reservation without usage. The record stays, so that a late reserve changes nothing.
-- Keys: reservation, account, slots, open
-- Args: claim_id, session
-- Constants: RECORD_S, ONE_CLIENT
-- ONE_CLIENT is 0 for the total.
-- Returns 1 if another claim of the session has a slot, else 0; for the total always 0.
local state, tokens, cost, day, month =
  unpack(redis.call('HMGET', reservation, 'state', 'tokens', 'cost', 'day', 'month'))
if state == 'open' then
  change(account, day, 'reserved_tokens', 0 - tokens)
  change(account, day, 'reserved_cost', 0 - cost)
  if month then
    change(account, month, 'reserved_cost', 0 - cost)
  end
end
if state == 'open' or not state then
  redis.call('HSET', reservation, 'state', 'released')
  redis.call('EXPIRE', reservation, RECORD_S)
end
redis.call('SREM', slots, claim_id)
redis.call('ZREM', open, claim_id)
return ONE_CLIENT == 1 and claimed_by_another(reservation, claim_id, slots, session) and 1 or 0
