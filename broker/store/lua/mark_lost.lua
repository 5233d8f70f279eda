#!lua flags=allow-oom
-- lose: running -> lost, by another worker, for an owner that is dead; -> cancelled where a cancel was accepted before.
-- The entry of epoch 2 in the journal makes Redis itself refuse whatever the owner, should it live, adds later.
-- KEYS[1] session, [2] events, [3] viewers
-- ARGV: the dead worker, seconds to keep the end, data of the error, data of the cancelled end, prefix of the bells
-- Returns {state, worker, end event, end id, end data} as it stands now, or {'gone'}.
local state, worker, last, cancel = unpack(redis.call('HMGET', KEYS[1], 'state', 'worker', 'last', 'cancel'))
if not state then
  return {'gone'}
end
if state == 'running' and worker == ARGV[1] then
  local n = string.format('%.0f', tonumber(last or 0) + 1)
  local event, data = 'error', ARGV[3]
  state = 'lost'
  if cancel then
    state, event, data = 'cancelled', 'done', ARGV[4]
  end
  redis.call('XADD', KEYS[2], '2-' .. n, 'end', event)
  redis.call('HDEL', KEYS[1], 'request')
  redis.call('HSET', KEYS[1], 'state', state, 'end_event', event, 'end_id', '2-' .. n .. '.end', 'end_data', data)
  redis.call('EXPIRE', KEYS[1], ARGV[2])
  redis.call('EXPIRE', KEYS[2], ARGV[2])
  local now = redis.call('TIME')
  for _, follower in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], now[1] * 1000, '+inf')) do
    redis.pcall('PUBLISH', ARGV[5] .. follower, 'ended ' .. string.match(KEYS[1], '{(.-)}'))
  end
  redis.call('DEL', KEYS[3])
end
return {state, worker or '', unpack(redis.call('HMGET', KEYS[1], 'end_event', 'end_id', 'end_data'))}
