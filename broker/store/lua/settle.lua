#!lua flags=allow-oom
-- settle: turns a reservation into what was spent, exactly once; or puts the truth in place of an estimate that was
-- settled before. What was given back by mistake and ran all the same is paid. While the truth behind an estimate can
-- still come, what was reserved above the estimate stays reserved: what is admitted meanwhile has room for the truth.
-- KEYS[1] reservation, [2] the client's slots, [3] the client's account, [4] everyone's account, [5] all open ones,
--     [6] the books of the reservation's day, [7] estimates whose truth is still to be asked for,
--     [8] the clients, [9] the models that those books name
-- ARGV: token, client, model for the books, the end's state, prompt tokens, completion tokens, cached tokens, reasoning tokens, cost,
--       '1' where the cost is known, '1' where it is an estimate, '1' to correct and nothing else, day,
--       seconds to keep the record, the upstream's name for the generation or '', ms after which anybody may ask by it,
--       clients, models that the books of a day name at most; the rest is 'other'
-- Returns 1 where it changed something.
-- A whole number as Redis reads one. Lua has a negative zero, told as '-0', which Redis (7.0) does not take for an
-- integer: negate by `0 - x`. Numbers of 17 digits and more would be told as 1e+17.
local function whole(number)
  return string.format('%.0f', number)
end
local held = redis.call('HMGET', KEYS[1], 'state', 'tokens', 'cost', 'day', 'estimated')
local state, day = held[1], held[4] or ARGV[13]
local correct = state == 'settled'
local prompt, completion, cost = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[9])
local cached, reasoning, estimated = tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[11])
local was = {prompt = 0, completion = 0, cached = 0, reasoning = 0, cost = 0, estimated = 0, unpriced = 0}
local is = {prompt = prompt, completion = completion, cached = cached, reasoning = reasoning, cost = cost,
  estimated = estimated, unpriced = ARGV[10] == '1' and 0 or 1}
local function note_estimate()
  if estimated == 0 then
    redis.call('ZREM', KEYS[7], ARGV[1])
  elseif ARGV[15] ~= '' then
    local now = redis.call('TIME')
    redis.call('HSET', KEYS[1], 'generation', ARGV[15])
    redis.call('HSETNX', KEYS[1], 'ended', string.format('%.0f', now[1] * 1000 + math.floor(now[2] / 1000)))
    redis.call('ZADD', KEYS[7], 'NX', now[1] * 1000 + math.floor(now[2] / 1000) + ARGV[16], ARGV[1])
    redis.call('EXPIRE', KEYS[7], ARGV[14])
  end
end
local function change_reserved(tokens, cost)
  for _, account in ipairs({KEYS[3], KEYS[4]}) do
    redis.call('HINCRBY', account, day .. ':reserved_tokens', string.format('%.0f', tokens + 0))
    redis.call('HINCRBY', account, day .. ':reserved_cost', string.format('%.0f', cost + 0))
  end
end
if correct then
  if held[5] ~= '1' or estimated == 1 then
    if held[5] == '1' then
      note_estimate()  -- whoever settled it first may not have known by which name to ask
    end
    return 0
  end
  for name, _ in pairs(was) do
    was[name] = tonumber(redis.call('HGET', KEYS[1], 'was_' .. name) or 0)
  end
  local kept = redis.call('HMGET', KEYS[1], 'kept_tokens', 'kept_cost')
  if kept[1] then
    change_reserved(0 - kept[1], 0 - kept[2])
    redis.call('HDEL', KEYS[1], 'kept_tokens', 'kept_cost')
  end
elseif ARGV[12] == '1' then
  return 0
elseif state == 'open' then
  local kept_tokens, kept_cost = 0, 0
  if estimated == 1 and ARGV[15] ~= '' then
    kept_tokens = math.max(0, held[2] - prompt - completion)
    kept_cost = math.max(0, held[3] - cost)
    redis.call('HSET', KEYS[1], 'kept_tokens', string.format('%.0f', kept_tokens),
      'kept_cost', string.format('%.0f', kept_cost))
  end
  change_reserved(kept_tokens - held[2], kept_cost - held[3])
end
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZREM', KEYS[5], ARGV[1])
local function named(key, name, most)
  if name == 'other' or redis.call('SISMEMBER', key, name) == 1 then
    return name
  elseif redis.call('SCARD', key) >= tonumber(most) then
    return 'other'
  end
  redis.call('SADD', key, name)
  redis.call('EXPIRE', key, 3024000)
  return name
end
local line = correct and redis.call('HGET', KEYS[1], 'line')
if not line then
  line = named(KEYS[8], ARGV[2], ARGV[17]) .. '\31' .. named(KEYS[9], ARGV[3], ARGV[18]) .. '\31'
  redis.call('HSET', KEYS[1], 'line', line)
end
for _, account in ipairs({KEYS[3], KEYS[4]}) do
  redis.call('HINCRBY', account, day .. ':spent_tokens', whole(prompt + completion - was.prompt - was.completion))
  redis.call('HINCRBY', account, day .. ':spent_cost', whole(cost - was.cost))
  redis.call('HINCRBY', account, day .. ':prompt', whole(prompt - was.prompt))
  redis.call('HINCRBY', account, day .. ':completion', whole(completion - was.completion))
  redis.call('HINCRBY', account, day .. ':estimated', whole(estimated - was.estimated))
  if not correct and redis.call('HINCRBY', account, day .. ':requests', 1) == 1 then
    -- The key of who comes every day never expires. Who stays away for three days has none, so older days are gone.
    for old = day - 7, day - 4 do
      for _, name in ipairs({'requests', 'prompt', 'completion', 'estimated', 'spent_tokens', 'spent_cost',
          'reserved_tokens', 'reserved_cost'}) do
        redis.call('HDEL', account, old .. ':' .. name)
      end
    end
  end
  redis.call('EXPIRE', account, 259200)
end
for name, value in pairs(is) do
  if value ~= was[name] then
    redis.call('HINCRBY', KEYS[6], line .. name, whole(value - was[name]))
  end
  redis.call('HSET', KEYS[1], 'was_' .. name, whole(value))
end
if not correct then
  redis.call('HINCRBY', KEYS[6], line .. 'requests', 1)
  if ARGV[4] ~= 'done' then
    redis.call('HINCRBY', KEYS[6], line .. (ARGV[4] == 'cancelled' and 'cancelled' or 'failed'), 1)
  end
end
redis.call('EXPIRE', KEYS[6], 3024000)
redis.call('HSET', KEYS[1], 'state', 'settled', 'estimated', ARGV[11], 'day', day)
redis.call('EXPIRE', KEYS[1], ARGV[14])
note_estimate()
return 1
