-- started: the generation of a running session has its request, so the prompt leaves Redis.
-- KEYS[1] session; ARGV: token
if redis.call('HGET', KEYS[1], 'token') == ARGV[1] then
  redis.call('HDEL', KEYS[1], 'request')
end
return 1
