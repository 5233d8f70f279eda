-- refuse: prepared -> prepared. This claim must not win any more: its reservation is about to be given back.
-- KEYS[1] session; ARGV: token
-- Returns 1, or 0 where it has won, or where the session is gone and nobody can tell.
local state, token = unpack(redis.call('HMGET', KEYS[1], 'state', 'token'))
if not state or token == ARGV[1] then
  return 0
end
if state == 'prepared' then
  redis.call('HSET', KEYS[1], 'refused:' .. ARGV[1], '1')
end
return 1
