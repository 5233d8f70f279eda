#!lua flags=allow-oom
-- running -> lost, or cancelled if a cancel was accepted before. Called by another worker when the owner is dead.
-- Keys: session, events, viewers
-- Args: claim_id, lost_data, cancelled_data
-- Constants: KEEP_S, REPLAY_S, CHANNELS
-- Returns the status of the session.
local state, owner, last, cancel = unpack(redis.call('HMGET', session, 'state', 'claim_id', 'last', 'cancel'))
if state == 'running' and owner == claim_id then
  local ending = {state = 'lost', event = 'error', data = lost_data}
  if cancel then
    ending = {state = 'cancelled', event = 'done', data = cancelled_data}
  end
  ending.id = '2-' .. whole((last or 0) + 1) .. '.end'
  write_end(session, events, viewers, ending, KEEP_S, REPLAY_S, CHANNELS)
end
return status(session)
