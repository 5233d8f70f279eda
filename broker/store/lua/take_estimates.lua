#!lua flags=allow-oom
-- Finds estimates whose final usage was not asked for in time, and gives each of them to one caller for a while.
-- Keys: estimates
-- Args: limit (int)
-- Constants: ASK_MS
-- estimates has the claims by the ms from which any worker may ask.
-- Returns the time in ms and the claim ids.
local now = now_ms()
local claim_ids = redis.call('ZRANGEBYSCORE', estimates, '-inf', now, 'LIMIT', 0, limit)
for _, claim_id in ipairs(claim_ids) do
  redis.call('ZADD', estimates, now + ASK_MS, claim_id)
end
return {whole(now), claim_ids}
