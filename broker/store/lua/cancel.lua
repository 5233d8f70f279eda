#!lua flags=allow-oom
-- prepared -> cancelled. Marks a running session, so that it can only end as cancelled, and notifies its owner.
-- Keys: session, events, viewers
-- Args: end_event, end_id, end_data
-- Constants: KEEP_S, REPLAY_S, CHANNELS
-- Returns the status of the session before the cancel, with the end that it has now.
local before = status(session)
if before[1] == 'prepared' then
  local ending = {state = 'cancelled', event = end_event, id = end_id, data = end_data}
  write_end(session, events, viewers, ending, KEEP_S, REPLAY_S, CHANNELS)
elseif before[1] == 'running' then
  redis.call('HSET', session, 'cancel', '1')
  notify(CHANNELS, before[2], 'cancel', session)
end
local now = status(session)
now[1] = before[1]
return now
