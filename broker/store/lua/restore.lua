-- (nothing) | prepared | running -> running, or the end that it had. Called by the owner after Redis has lost
-- everything or its last writes. A claim that another worker has made since wins.
-- Keys: session, events, viewers
-- Args: claim_id, worker, spec, first (int), newest (int), batch, end_state, end_event, end_id, end_data
-- Constants: RUNNING_S, KEEP_S, REPLAY_S, CHANNELS
-- The end is empty while the generation runs.
-- Returns 1, or 0 if the session has an end or belongs to another claim.
local state, owner, last = unpack(redis.call('HMGET', session, 'state', 'claim_id', 'last'))
local ours = state == 'running' and owner == claim_id
if state and state ~= 'prepared' and not ours then
  return 0
end
if not ours then
  redis.call('HSET', session, 'state', 'running', 'claim_id', claim_id, 'worker', worker, 'spec', spec)
  redis.call('HDEL', session, 'request')
  redis.call('EXPIRE', session, RUNNING_S)
  redis.call('DEL', events)
end
local ends_at = ours and tonumber(last or 0) or 0
-- Events that the owner does not have any more leave a gap, which is reported to readers.
append(session, events, math.max(ends_at, first - 1), first, newest, batch)
redis.call('HSET', session, 'last', whole(math.max(ends_at, newest)))
if redis.call('EXISTS', events) == 1 then
  redis.call('EXPIRE', events, RUNNING_S)
end
if end_state ~= '' then
  local ending = {state = end_state, event = end_event, id = end_id, data = end_data}
  write_end(session, events, viewers, ending, KEEP_S, REPLAY_S, CHANNELS)
end
return 1
