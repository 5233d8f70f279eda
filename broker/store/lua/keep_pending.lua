-- A session whose page waits in line is pending for KEEP_S seconds more at least.
-- Keys: pending, sizes
-- Args: session
-- Constants: KEEP_S
-- Returns 1 where that is longer than before, else 0.
local changed = redis.call('ZADD', pending, 'XX', 'GT', 'CH', now_ms() + KEEP_S * 1000, session)
for _, key in ipairs({pending, sizes}) do
  if redis.call('TTL', key) < KEEP_S then
    redis.call('EXPIRE', key, KEEP_S)
  end
end
return changed
