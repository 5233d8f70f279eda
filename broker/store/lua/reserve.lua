-- reserve: takes a slot and the worst case of one generation from all accounts it touches, or nothing. Asking again
-- with the same token gives the same answer, and renews the lease.
-- KEYS[1] reservation, [2] the client's slots, [3] the client's account, [4] everyone's account, [5] all open ones,
--     [6] the client's waiting sessions, [7] their bytes and total, [8] all waiting sessions, [9] their bytes and total
-- ARGV: token, session, client, model, worst tokens, worst cost, lease in ms,
--       limits: streams, tokens a day, cost a day, everyone's cost a day; the day of a generation that runs already
--       ('0' for today), to reserve whatever the limits say and also what was given back; else ''
-- Returns {'ok', day}, {'closed'} for a reservation that was given back or settled, or
-- {'streams', seconds until that may change}, {'claiming'} where another claim of the same session holds a slot, or
-- {'tokens' | 'cost' | 'total', seconds until tomorrow, 1 where nothing that others reserved could make room for it}.
local now = redis.call('TIME')
local ms = now[1] * 1000 + math.floor(now[2] / 1000)
local state, held_day = unpack(redis.call('HMGET', KEYS[1], 'state', 'day'))
local runs = ARGV[12] ~= ''
if state == 'open' then
  redis.call('ZADD', KEYS[2], ms + ARGV[7], ARGV[1])
  redis.call('ZADD', KEYS[5], ms + ARGV[7], ARGV[1])
  return {'ok', held_day}
elseif state == 'settled' or state and not runs then
  return {'closed'}
end
local day = runs and ARGV[12] ~= '0' and tonumber(ARGV[12]) or math.floor(now[1] / 86400)
local function refused(kind, seconds, final)
  local records = string.sub(KEYS[1], 1, #KEYS[1] - #ARGV[1])
  for _, token in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
    if redis.call('HGET', records .. token, 'session') == ARGV[2] then
      return {'claiming'}
    end
  end
  return {kind, seconds, final}
end
-- 0 where an amount does not fit for now, 1 where it would not even if nothing was reserved, nil where it fits.
local function misfit(account, what, amount, limit)
  local spent = tonumber(redis.call('HGET', account, day .. ':spent_' .. what) or 0)
  local reserved = tonumber(redis.call('HGET', account, day .. ':reserved_' .. what) or 0)
  if limit > 0 and spent + reserved + amount > limit then
    return spent + amount > limit and 1 or 0
  end
  return nil
end
local tokens, cost = tonumber(ARGV[5]), tonumber(ARGV[6])
local max_streams, max_tokens = tonumber(ARGV[8]), tonumber(ARGV[9])
local max_cost, max_total = tonumber(ARGV[10]), tonumber(ARGV[11])
if not runs then
  -- A slot whose lease ran out counts until its reservation is settled or given back: after an outage of Redis its
  -- worker lives, and only had nobody to renew it with.
  local until_tomorrow = (day + 1) * 86400 - now[1]
  if redis.call('ZCARD', KEYS[2]) >= max_streams then
    return refused('streams', 5)
  end
  for _, limited in ipairs({{'tokens', KEYS[3], 'tokens', tokens, max_tokens}, {'cost', KEYS[3], 'cost', cost, max_cost},
      {'total', KEYS[4], 'cost', cost, max_total}}) do
    local final = misfit(limited[2], limited[3], limited[4], limited[5])
    if final then
      return refused(limited[1], until_tomorrow, final)
    end
  end
end
redis.call('HSET', KEYS[1], 'state', 'open', 'session', ARGV[2], 'client', ARGV[3], 'model', ARGV[4],
  'tokens', ARGV[5], 'cost', ARGV[6], 'day', day)
redis.call('EXPIRE', KEYS[1], 259200)
for _, account in ipairs({KEYS[3], KEYS[4]}) do
  redis.call('HINCRBY', account, day .. ':reserved_tokens', ARGV[5])
  redis.call('HINCRBY', account, day .. ':reserved_cost', ARGV[6])
  redis.call('EXPIRE', account, 259200)
end
redis.call('ZADD', KEYS[2], ms + ARGV[7], ARGV[1])
redis.call('EXPIRE', KEYS[2], 259200)
redis.call('ZADD', KEYS[5], ms + ARGV[7], ARGV[1])
redis.call('EXPIRE', KEYS[5], 259200)
for i = 6, 8, 2 do
  local size = redis.call('HGET', KEYS[i + 1], ARGV[2])
  if size then
    redis.call('HDEL', KEYS[i + 1], ARGV[2])
    redis.call('HINCRBY', KEYS[i + 1], 'total', string.format('%d', 0 - size))
  end
  redis.call('ZREM', KEYS[i], ARGV[2])
end
return {'ok', day}
