-- cancel: prepared -> cancelled. A running session is stopped by its owner; this only tells who that is.
-- KEYS[1] session; ARGV: seconds to keep its end, end event, end id, end data
-- Returns {state before, worker, end event, end id, end data}.
local state, worker = unpack(redis.call('HMGET', KEYS[1], 'state', 'worker'))
if not state then
  return {'gone'}
end
if state == 'prepared' then
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[1], 'state', 'cancelled', 'end_event', ARGV[2], 'end_id', ARGV[3], 'end_data', ARGV[4])
  redis.call('EXPIRE', KEYS[1], ARGV[1])
end
return {state, worker or '', unpack(redis.call('HMGET', KEYS[1], 'end_event', 'end_id', 'end_data'))}
