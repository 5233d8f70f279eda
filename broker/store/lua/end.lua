-- end: running -> done | failed | cancelled | abandoned, with every event not yet journaled, in one step.
-- Whoever writes the end first decides it.
-- KEYS[1] session, [2] events, [3] viewers
-- ARGV: token, state, end event, end id, end data, seconds to keep it,
--       number of the first event, number of the last, the events, '1' to refuse while anybody watches elsewhere,
--       prefix of the bells, seconds to keep the journal
-- Returns {state, '', end event, end id, end data} as it stands now, {'cancel'} where a cancel was accepted and
-- another end proposed, {'watched'}, {'behind', last journaled} where events are missing before the first, or {'gone'}.
local state, token, last, cancel = unpack(redis.call('HMGET', KEYS[1], 'state', 'token', 'last', 'cancel'))
if not state then
  return {'gone'}
end
if state == 'running' and token == ARGV[1] then
  if cancel and ARGV[2] ~= 'cancelled' then
    return {'cancel'}
  end
  local now = redis.call('TIME')
  local viewers = redis.call('ZRANGEBYSCORE', KEYS[3], now[1] * 1000 + math.floor(now[2] / 1000), '+inf')
  if ARGV[10] == '1' and #viewers > 0 then
    return {'watched'}
  end
  local first, newest = tonumber(ARGV[7]), tonumber(ARGV[8])
  last = tonumber(last or 0)
  if newest > last then
    if first > last + 1 then
      return {'behind', last}
    end
    redis.call('XADD', KEYS[2], '1-' .. ARGV[8], 'first', ARGV[7], 'events', ARGV[9])
    redis.call('HSET', KEYS[1], 'last', ARGV[8])
  end
  state = ARGV[2]
  redis.call('HDEL', KEYS[1], 'request')
  redis.call('HSET', KEYS[1], 'state', state, 'end_event', ARGV[3], 'end_id', ARGV[4], 'end_data', ARGV[5])
  redis.call('EXPIRE', KEYS[1], ARGV[6])
  if redis.call('EXPIRE', KEYS[2], ARGV[12]) == 1 then
    redis.call('HSET', KEYS[1], 'replayed', '1')  -- for as long as its journal is there
  end
  redis.call('DEL', KEYS[3])
  for _, worker in ipairs(viewers) do
    redis.pcall('PUBLISH', ARGV[11] .. worker, 'ended ' .. string.match(KEYS[1], '{(.-)}'))
  end
end
return {state, '', unpack(redis.call('HMGET', KEYS[1], 'end_event', 'end_id', 'end_data'))}
