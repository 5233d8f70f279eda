-- admit: a client may prepare one more session, by what waits and by what is spent. What others have reserved does not
-- count here, only at the claim.
-- KEYS[1] the client's waiting sessions, [2] the client's account, [3] everyone's account
-- ARGV: session, seconds that it waits, worst tokens, worst cost,
--       limits: waiting, tokens a day, cost a day, everyone's cost a day
-- Returns {'ok'}, or {'waiting' | 'tokens' | 'cost' | 'total', seconds until that may change}.
local now = redis.call('TIME')
local ms = now[1] * 1000 + math.floor(now[2] / 1000)
local day = math.floor(now[1] / 86400)
local function spent(account, what)
  return tonumber(redis.call('HGET', account, day .. ':' .. what) or 0)
end
local until_tomorrow = (day + 1) * 86400 - now[1]
local tokens, cost = tonumber(ARGV[3]), tonumber(ARGV[4])
local max_tokens, max_cost, max_total = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
if max_tokens > 0 and spent(KEYS[2], 'spent_tokens') + tokens > max_tokens then
  return {'tokens', until_tomorrow}
end
if max_cost > 0 and spent(KEYS[2], 'spent_cost') + cost > max_cost then
  return {'cost', until_tomorrow}
end
if max_total > 0 and spent(KEYS[3], 'spent_cost') + cost > max_total then
  return {'total', until_tomorrow}
end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', ms)
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[5]) and not redis.call('ZSCORE', KEYS[1], ARGV[1]) then
  local first = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
  return {'waiting', math.max(1, math.ceil((first[2] - ms) / 1000))}
end
redis.call('ZADD', KEYS[1], ms + ARGV[2] * 1000, ARGV[1])
redis.call('EXPIRE', KEYS[1], ARGV[2])
return {'ok'}
