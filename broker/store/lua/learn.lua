-- Stores one more sample of a model. A repeat counts an answer twice, which does no harm.
-- Keys: samples, heard
-- Args: model, client, value
-- Constants: MAX_SAMPLES, MAX_SAMPLES_OF_CLIENT, MAX_MODELS, MODEL_S
-- heard has the models by the time of their last sample. If a client has its maximum number of samples, its own
-- oldest sample is removed.
-- Returns the samples of the model, the newest first: 'client:value' and so on, with spaces between.
local mine = client .. ':'
local kept, own = {mine .. value}, 1
for sample in string.gmatch(redis.call('HGET', samples, model) or '', '%S+') do
  local is_own = string.sub(sample, 1, #mine) == mine
  own = own + (is_own and 1 or 0)
  if #kept < MAX_SAMPLES and (not is_own or own <= MAX_SAMPLES_OF_CLIENT) then
    kept[#kept + 1] = sample
  end
end
local joined = table.concat(kept, ' ')
redis.call('HSET', samples, model, joined)
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000 -- in microseconds, because the order of two samples counts
redis.call('ZADD', heard, now, model)
for _, gone in ipairs({
  redis.call('ZRANGEBYSCORE', heard, '-inf', now - MODEL_S),
  redis.call('ZRANGE', heard, 0, -1 - MAX_MODELS),
}) do
  for _, name in ipairs(gone) do
    redis.call('HDEL', samples, name)
    redis.call('ZREM', heard, name)
  end
end
redis.call('EXPIRE', samples, MODEL_S)
redis.call('EXPIRE', heard, MODEL_S)
return joined
