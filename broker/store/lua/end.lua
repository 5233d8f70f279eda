-- end: running -> done | failed | cancelled | abandoned. Whoever writes the end first decides it.
-- KEYS[1] session; ARGV: token, state, end event, end id, end data, seconds to keep it
-- Returns {state, end event, end id, end data} as it stands now, or {'gone'}.
local state, token = unpack(redis.call('HMGET', KEYS[1], 'state', 'token'))
if not state then
  return {'gone'}
end
if state == 'running' and token == ARGV[1] then
  state = ARGV[2]
  redis.call('HDEL', KEYS[1], 'request')
  redis.call('HSET', KEYS[1], 'state', state, 'end_event', ARGV[3], 'end_id', ARGV[4], 'end_data', ARGV[5])
  redis.call('EXPIRE', KEYS[1], ARGV[6])
end
return {state, unpack(redis.call('HMGET', KEYS[1], 'end_event', 'end_id', 'end_data'))}
