-- prepared -> prepared. This claim must not win any more: its reservation is about to be given back.
-- Keys: session
-- Args: claim_id
-- Returns 1, or 0 where it has won, or where the session is gone and nobody can tell.
local state, owner = unpack(redis.call('HMGET', session, 'state', 'claim_id'))
if not state or owner == claim_id then
  return 0
end
if state == 'prepared' then
  redis.call('HSET', session, 'refused:' .. claim_id, '1')
end
return 1
