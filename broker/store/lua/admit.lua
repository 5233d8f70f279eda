-- admit: a client may prepare one more session, by what waits and by what is spent. What others have reserved does not
-- count here, only at the claim.
-- KEYS[1] the client's waiting sessions, [2] the client's account, [3] everyone's account,
--     [4] bytes of the client's waiting sessions and their total, [5] all waiting sessions, [6] their bytes and total
-- ARGV: session, seconds that it waits, worst tokens, worst cost,
--       limits: waiting, tokens a day, cost a day, everyone's cost a day; bytes of the session as stored,
--       limits: bytes of the client, of all
-- Returns {'ok'}, or {'waiting' | 'full' | 'tokens' | 'cost' | 'total', seconds until that may change}.
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
-- A set of waiting sessions by the time at which they expire, and a hash of their bytes with the total.
local function drop(set, sizes, session)
  local size = redis.call('HGET', sizes, session)
  if size then
    redis.call('HDEL', sizes, session)
    redis.call('HINCRBY', sizes, 'total', string.format('%d', 0 - size))
  end
  redis.call('ZREM', set, session)
end
local function held(set, sizes)
  for _, session in ipairs(redis.call('ZRANGEBYSCORE', set, '-inf', ms, 'LIMIT', 0, 1000)) do
    drop(set, sizes, session)
  end
  drop(set, sizes, ARGV[1]) -- asked for again
  if redis.call('ZCARD', set) == 0 then
    redis.call('DEL', sizes)
  end
  return tonumber(redis.call('HGET', sizes, 'total') or 0)
end
local own, all = held(KEYS[1], KEYS[4]), held(KEYS[5], KEYS[6])
local size, max_own, max_all = tonumber(ARGV[9]), tonumber(ARGV[10]), tonumber(ARGV[11])
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[5]) or own + size > max_own then
  local first = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
  return {'waiting', first[2] and math.max(1, math.ceil((first[2] - ms) / 1000)) or tonumber(ARGV[2])}
end
-- Where more than half is taken, a client may hold a sixteenth of what is left, so that a few cannot lock out the rest.
if all + size > max_all or all * 2 > max_all and (own + size) * 16 > max_all - all then
  return {'full', 5}
end
for i = 1, 5, 4 do
  local set, sizes = KEYS[i], KEYS[i == 1 and 4 or 6]
  redis.call('ZADD', set, ms + ARGV[2] * 1000, ARGV[1])
  redis.call('HSET', sizes, ARGV[1], ARGV[9])
  redis.call('HINCRBY', sizes, 'total', ARGV[9])
  for _, key in ipairs({set, sizes}) do
    if redis.call('TTL', key) < tonumber(ARGV[2]) then -- a worker with an older setting may let its own wait longer
      redis.call('EXPIRE', key, ARGV[2])
    end
  end
end
return {'ok'}
