-- Adds a pending session to an account, if its pending sessions and its usage leave room. Reservations count only at
-- the claim.
-- Keys: account, pending, sizes
-- Args: session, client, size (int), tokens (int), cost (int), max_tokens (int), max_cost (int), max_month_cost (int),
--     before_ms (int)
-- Constants: SESSION_S, MAX_PENDING, MAX_BYTES, FAIR_FROM
-- pending has the sessions by the ms at which they expire. sizes has '<size> <client>' of each session, the bytes of
-- each client, and the bytes of all clients as 'total'. Above FAIR_FROM bytes, a client may take a sixteenth of the
-- rest, so that a few clients cannot block all others. A limit of 0 means no limit, except for sessions and bytes.
-- before_ms is the time, in ms by this clock, from which on nothing is done; 0 for none.
-- Returns {'ok'}, {'late'}, or {'month' | 'tokens' | 'cost' | 'pending' | 'full', seconds until this may change}.
local now = now_ms()
if before_ms > 0 and now >= before_ms then
  return {'late'}
end
local day = math.floor(now / 86400000)
local function over(period, name, amount, limit)
  return limit > 0 and tonumber(redis.call('HGET', account, period .. ':' .. name) or 0) + amount > limit
end
local month, month_end = month_of(day)
for _, budget in ipairs({
  {'month', month, 'spent_cost', cost, max_month_cost, month_end},
  {'tokens', day, 'spent_tokens', tokens, max_tokens, day + 1},
  {'cost', day, 'spent_cost', cost, max_cost, day + 1},
}) do
  local kind, period, name, amount, limit, ends = unpack(budget)
  if over(period, name, amount, limit) then
    return {kind, ends * 86400 - math.floor(now / 1000)}
  end
end
local expired = redis.call('ZRANGEBYSCORE', pending, '-inf', now, 'LIMIT', 0, 1000)
for _, each in ipairs({session, unpack(expired)}) do -- the session itself, if this call is a repeat
  forget(pending, sizes, each)
end
if redis.call('ZCARD', pending) == 0 then
  redis.call('DEL', sizes)
end
local all = tonumber(redis.call('HGET', sizes, 'total') or 0)
local own = tonumber(redis.call('HGET', sizes, 'of:' .. client) or 0)
if redis.call('ZCARD', pending) >= MAX_PENDING then
  local first = redis.call('ZRANGE', pending, 0, 0, 'WITHSCORES')
  return {'pending', math.max(1, math.ceil((first[2] - now) / 1000))}
elseif all + size > MAX_BYTES or all > FAIR_FROM and (own + size) * 16 > MAX_BYTES - all then
  return {'full', 5}
end
redis.call('ZADD', pending, now + SESSION_S * 1000, session)
redis.call('HSET', sizes, session, whole(size) .. ' ' .. client)
redis.call('HINCRBY', sizes, 'total', whole(size))
redis.call('HINCRBY', sizes, 'of:' .. client, whole(size))
for _, key in ipairs({pending, sizes}) do
  if redis.call('TTL', key) < SESSION_S then -- a worker with an older setting may have a longer SESSION_S
    redis.call('EXPIRE', key, SESSION_S)
  end
end
return {'ok'}
