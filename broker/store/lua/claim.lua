-- prepared -> running. Exactly one claim wins. A repeat with its id gets the same answer, unless a cancel was accepted.
-- A claim cannot win after it was refused because its reservation was released.
-- Keys: session
-- Args: claim_id, worker
-- Constants: RUNNING_S
-- Returns {'won', request, spec}, {'cancel'} if it has won and was cancelled since, or the status of the session.
local state, owner, cancel = unpack(redis.call('HMGET', session, 'state', 'claim_id', 'cancel'))
if state == 'prepared' and redis.call('HEXISTS', session, 'refused:' .. claim_id) == 0 then
  redis.call('HSET', session, 'state', 'running', 'claim_id', claim_id, 'worker', worker)
  redis.call('EXPIRE', session, RUNNING_S)
elseif state ~= 'running' or owner ~= claim_id then
  return status(session)
elseif cancel then
  return {'cancel'}
end
return {'won', unpack(redis.call('HMGET', session, 'request', 'spec'))}
