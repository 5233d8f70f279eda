-- prepared -> running. Exactly one claim wins. A repeat with its id gets the same answer, unless a cancel was accepted.
-- A claim cannot win after it was refused because its reservation was released.
-- Keys: session, reservation
-- Args: claim_id, worker, only_if_reserved (int)
-- Constants: RUNNING_S
-- only_if_reserved is 1 where the reservation was made by the call before: then a claim wins only if that is open. Else
-- it is 0, and the reservation is not read: in a cluster it is on another node.
-- Returns {'won', request, spec}, {'cancel'} if it has won and was cancelled since, {'unreserved'} if its reservation is
-- not open, or the status of the session.
local state, owner, cancel = unpack(redis.call('HMGET', session, 'state', 'claim_id', 'cancel'))
if state == 'prepared' and redis.call('HEXISTS', session, 'refused:' .. claim_id) == 0 then
  if only_if_reserved == 1 and redis.call('HGET', reservation, 'state') ~= 'open' then
    return {'unreserved'}
  end
  redis.call('HSET', session, 'state', 'running', 'claim_id', claim_id, 'worker', worker)
  redis.call('EXPIRE', session, RUNNING_S)
elseif state ~= 'running' or owner ~= claim_id then
  return status(session)
elseif cancel then
  return {'cancel'}
end
return {'won', unpack(redis.call('HMGET', session, 'request', 'spec'))}
