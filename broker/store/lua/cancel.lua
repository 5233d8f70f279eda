#!lua flags=allow-oom
-- cancel: prepared -> cancelled; a running session is marked, and its owner told, so that it can end in nothing else.
-- KEYS[1] session; ARGV: seconds to keep its end, end event, end id, end data, prefix of the bells
-- Returns {state before, worker, end event, end id, end data}.
local state, worker, client = unpack(redis.call('HMGET', KEYS[1], 'state', 'worker', 'client'))
if not state then
  return {'gone'}
end
if state == 'prepared' then
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[1], 'client', client or '')
  redis.call('HSET', KEYS[1], 'state', 'cancelled', 'end_event', ARGV[2], 'end_id', ARGV[3], 'end_data', ARGV[4])
  redis.call('EXPIRE', KEYS[1], ARGV[1])
elseif state == 'running' then
  redis.call('HSET', KEYS[1], 'cancel', '1')
  redis.pcall('PUBLISH', ARGV[5] .. worker, 'cancel ' .. string.match(KEYS[1], '{(.-)}'))
end
return {state, worker or '', unpack(redis.call('HMGET', KEYS[1], 'end_event', 'end_id', 'end_data'))}
