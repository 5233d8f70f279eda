-- prepared -> prepared. Prevents a claim from winning, because its reservation is about to be released.
-- Keys: session
-- Args: claim_id
-- Returns 1, or 0 if the claim has won, or if the session is gone and so that is not known.
local state, owner = unpack(redis.call('HMGET', session, 'state', 'claim_id'))
if not state or owner == claim_id then
  return 0
end
if state == 'prepared' then
  redis.call('HSET', session, 'refused:' .. claim_id, '1')
end
return 1
