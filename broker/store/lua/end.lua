-- running -> done | failed | cancelled | abandoned. Writes the end and all events that are not journaled yet in one
-- step. The first end that is written counts.
-- Keys: session, events, viewers
-- Args: claim_id, end_state, end_event, end_id, end_data, first (int), newest (int), batch, only_if_unwatched (int)
-- Constants: KEEP_S, REPLAY_S, CHANNELS
-- Returns the status of the session, {'cancel'} if a cancel was accepted and another end is proposed, {'watched'} if
-- another worker watches, or {'behind', last journaled} if events are missing before the first.
local state, owner, last, cancel = unpack(redis.call('HMGET', session, 'state', 'claim_id', 'last', 'cancel'))
if state == 'running' and owner == claim_id then
  last = tonumber(last or 0)
  if cancel and end_state ~= 'cancelled' then
    return {'cancel'}
  elseif only_if_unwatched == 1 and #watching(viewers) > 0 then
    return {'watched'}
  elseif not append(session, events, last, first, newest, batch) then
    return {'behind', last}
  end
  local ending = {state = end_state, event = end_event, id = end_id, data = end_data}
  write_end(session, events, viewers, ending, KEEP_S, REPLAY_S, CHANNELS)
end
return status(session)
