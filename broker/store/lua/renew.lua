#!lua flags=allow-oom
-- Renews the leases of reservations, expired ones as well: while Redis was away nobody could.
-- Keys: open, reservations...
-- Args: claim_ids...
-- Constants: LEASE_MS, ACCOUNT_S
-- Returns the numbers, from 1, of those that are not open.
local lease = now_ms() + LEASE_MS
local closed = {}
for i, reservation in ipairs(reservations) do
  if redis.pcall('HGET', reservation, 'state') == 'open' then -- one that cannot be read stops no other
    redis.call('ZADD', open, lease, claim_ids[i])
  else
    closed[#closed + 1] = i
  end
end
redis.call('EXPIRE', open, ACCOUNT_S)
return closed
