-- running -> running. Journals events of the owner, and returns whether others have cancelled or watch the session.
-- Without events (newest below first) it only reads.
-- Keys: session, events, viewers
-- Args: claim_id, first (int), newest (int), batch
-- Constants: RUNNING_S, CHANNELS
-- Returns one string, because it is parsed often: state, last journaled, 1 if a cancel was accepted, viewers on other
-- workers. Any state but running means that the session is not the caller's. Events that do not follow the last
-- journaled one are not written: the owner sends again from there.
local state, owner, last, cancel = unpack(redis.call('HMGET', session, 'state', 'claim_id', 'last', 'cancel'))
last = tonumber(last or 0)
if state ~= 'running' or owner ~= claim_id then
  state = state == 'running' and 'lost' or state or 'gone'
  return redis.status_reply(state .. ' ' .. whole(last) .. ' 0 0')
end
-- This must be the first write: a full Redis refuses it and so the whole script. It would not refuse the other writes.
local ends_at = append(session, events, last, first, newest, batch) or last
redis.call('HDEL', session, 'request')
local viewing = watching(viewers)
if ends_at > last then
  if redis.call('XLEN', events) == 1 then
    redis.call('EXPIRE', events, RUNNING_S)
  end
  for _, worker in ipairs(viewing) do
    notify(CHANNELS, worker, 'events', session, ' ' .. ARGV[2] .. ' ' .. ARGV[3] .. '\n' .. batch)
  end
end
return redis.status_reply('running ' .. whole(ends_at) .. ' ' .. (cancel and 1 or 0) .. ' ' .. #viewing)
