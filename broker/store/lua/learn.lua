-- Keep one more sample of a model's bytes per token. Run twice, it counts an answer twice, which does no harm.
-- KEYS[1] samples by model, [2] models by the time of their last sample
-- ARGV: model, client, bytes per token, samples kept of a model, samples kept of a client among them, models kept,
-- seconds that a model is kept after its last sample
-- Returns the samples of the model, the newest first: 'client:bytes per token' and so on, with spaces between.
-- A client that has as many as it may have loses its own oldest, nobody else's.
local model, mine = ARGV[1], ARGV[2] .. ':'
local most, most_of_client = tonumber(ARGV[4]), tonumber(ARGV[5])
local kept, own = {mine .. ARGV[3]}, 1
for sample in string.gmatch(redis.call('HGET', KEYS[1], model) or '', '%S+') do
  local is_own = string.sub(sample, 1, #mine) == mine
  own = own + (is_own and 1 or 0)
  if #kept < most and (not is_own or own <= most_of_client) then
    kept[#kept + 1] = sample
  end
end
local samples = table.concat(kept, ' ')
redis.call('HSET', KEYS[1], model, samples)
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
redis.call('ZADD', KEYS[2], now, model)
for _, silent in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now - ARGV[7])) do
  redis.call('HDEL', KEYS[1], silent)
  redis.call('ZREM', KEYS[2], silent)
end
for _, surplus in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1 - ARGV[6])) do
  redis.call('HDEL', KEYS[1], surplus)
  redis.call('ZREM', KEYS[2], surplus)
end
redis.call('EXPIRE', KEYS[1], ARGV[7])
redis.call('EXPIRE', KEYS[2], ARGV[7])
return samples
