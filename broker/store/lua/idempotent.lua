-- idempotent: binds an Idempotency-Key to a session, unless it is bound already.
-- KEYS[1] the key; ARGV: seconds to live, the binding, the binding to replace ('' for none)
-- Returns the binding that holds now.
local bound = redis.call('GET', KEYS[1])
if not bound or bound == ARGV[3] then
  redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[1])
  return ARGV[2]
end
return bound
