-- Takes a slot and the worst case of one generation from an account, or nothing. Asking again with the same claim gives
-- the same answer, and renews the lease.
-- Keys: reservation, account, slots, open
-- Args: claim_id, session, spec, tokens (int), cost (int), running_since
-- Constants: LEASE_MS, ACCOUNT_S, MAX_STREAMS, MAX_TOKENS, MAX_COST
-- running_since is empty at a claim. For a generation that runs already it is the day of its claim, or 0 for today: then
-- it is reserved whatever the limits say, and also where it was given back.
-- Returns {'ok', day}, {'closed'} for a reservation that was given back or settled, {'claiming'} where another claim of
-- the session has taken what this one lacks, or {'streams' | 'tokens' | 'cost', seconds until that may change, 1 where
-- it would not fit even if nothing was reserved}.
local now = now_ms()
local state, day = unpack(redis.call('HMGET', reservation, 'state', 'day'))
if state == 'open' then
  redis.call('ZADD', open, now + LEASE_MS, claim_id)
  redis.call('SADD', slots, claim_id)
  return {'ok', tonumber(day)}
elseif state == 'settled' or state and running_since == '' then
  return {'closed'}
end
local today = math.floor(now / 86400000)
day = tonumber(running_since) or 0
if day == 0 then
  day = today
end
local function refused(kind, seconds, final)
  if claimed_by_another(reservation, claim_id, slots, session) then
    return {'claiming'}
  end
  return {kind, seconds, final}
end
if running_since == '' then
  -- A slot whose lease ran out counts until its reservation is settled or given back: after an outage of Redis its
  -- worker lives, and only had no Redis to renew it in.
  if redis.call('SCARD', slots) >= MAX_STREAMS then
    return refused('streams', 5, 0)
  end
  for _, budget in ipairs({{'tokens', tokens, MAX_TOKENS}, {'cost', cost, MAX_COST}}) do
    local kind, amount, limit = unpack(budget)
    local spent = tonumber(redis.call('HGET', account, day .. ':spent_' .. kind) or 0)
    local reserved = tonumber(redis.call('HGET', account, day .. ':reserved_' .. kind) or 0)
    if limit > 0 and spent + reserved + amount > limit then
      return refused(kind, (day + 1) * 86400 - math.floor(now / 1000), spent + amount > limit and 1 or 0)
    end
  end
end
redis.call('HSET', reservation, 'state', 'open', 'session', session, 'spec', spec, 'tokens', whole(tokens),
  'cost', whole(cost), 'day', day)
change(account, day, 'reserved_tokens', tokens)
change(account, day, 'reserved_cost', cost)
redis.call('SADD', slots, claim_id)
redis.call('ZADD', open, now + LEASE_MS, claim_id)
for _, key in ipairs({reservation, account, slots, open}) do
  redis.call('EXPIRE', key, ACCOUNT_S)
end
return {'ok', day}
