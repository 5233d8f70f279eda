-- prepared -> prepared. A session whose page waits in line can be claimed for KEEP_S seconds more at least.
-- Keys: session
-- Constants: KEEP_S
-- Returns 1, or 0 where it is not prepared.
local state, ends_at = unpack(redis.call('HMGET', session, 'state', 'until'))
if state ~= 'prepared' then
  return 0
end
local kept_until = now_ms() + KEEP_S * 1000
if tonumber(ends_at) < kept_until then
  redis.call('HSET', session, 'until', whole(kept_until))
  redis.call('EXPIRE', session, KEEP_S)
end
return 1
