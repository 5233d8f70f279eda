-- running -> running. The owner journals events, and learns what others want of the session. With no events (newest
-- below first) it only asks.
-- Keys: session, events, viewers
-- Args: claim_id, first (int), newest (int), batch
-- Constants: RUNNING_S, CHANNELS
-- Returns one line, because it is read so often: state, last journaled, 1 if a cancel waits, viewers on other workers.
-- Any state but running says that the session is not the caller's. Events that do not follow on the last journaled are
-- not written: the owner sends again from there.
local state, owner, last, cancel = unpack(redis.call('HMGET', session, 'state', 'claim_id', 'last', 'cancel'))
last = tonumber(last or 0)
if state ~= 'running' or owner ~= claim_id then
  state = state == 'running' and 'lost' or state or 'gone'
  return redis.status_reply(state .. ' ' .. whole(last) .. ' 0 0')
end
-- The first of all writes: a full Redis refuses it and with it the rest, and nothing else here would be refused.
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
