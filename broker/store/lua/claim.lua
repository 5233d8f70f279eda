-- prepared -> running. Exactly one claim wins. A repeat with its id gets the same answer, unless a cancel was accepted.
-- A claim cannot win after it was refused because its reservation was released.
-- Keys: session, reservation
-- Args: claim_id, worker, before_ms (int)
-- Constants: RUNNING_S
-- before_ms is given where the reservation was made by the call before: then a claim wins only if that is open, and only
-- before this time, in ms by this clock. Redis may have stood still, and nobody wait any more. Else it is 0, and the
-- reservation is not read: in a cluster it is on another node.
-- Returns {'won', request, spec}, {'cancel'} if it has won and was cancelled since, {'unreserved'} if its reservation is
-- not open or it is too late, or the status of the session.
local state, owner, cancel = unpack(redis.call('HMGET', session, 'state', 'claim_id', 'cancel'))
if state == 'prepared' and redis.call('HEXISTS', session, 'refused:' .. claim_id) == 0 then
  if before_ms > 0 and (now_ms() >= before_ms or redis.call('HGET', reservation, 'state') ~= 'open') then
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
