#!lua flags=allow-oom
-- Renews the leases of reservations, including expired ones: nothing could be renewed while Redis was away.
-- Keys: open, reservations...
-- Args: claim_ids...
-- Constants: LEASE_MS, ACCOUNT_S
-- Returns the numbers, from 1, of those that are not open.
local lease = now_ms() + LEASE_MS
local closed = {}
for i, reservation in ipairs(reservations) do
  if redis.pcall('HGET', reservation, 'state') == 'open' then -- an unreadable record must not stop the others
    redis.call('ZADD', open, lease, claim_ids[i])
  else
    closed[#closed + 1] = i
  end
end
redis.call('EXPIRE', open, ACCOUNT_S)
return closed
