-- Binds an Idempotency-Key to a session, unless it is bound already.
-- Keys: key
-- Args: binding, replaced
-- Constants: KEY_S
-- replaced is a binding that may be replaced, '' for none.
-- Returns the binding that counts now.
local bound = redis.call('GET', key)
if not bound or bound == replaced then
  redis.call('SET', key, binding, 'EX', KEY_S)
  return binding
end
return bound
