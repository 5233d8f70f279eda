-- (nothing) -> prepared. Stores a session with its request.
-- Keys: session
-- Args: request, spec
-- Constants: SESSION_S
-- Returns the time in ms until which it can be claimed, or 0 if the session exists already.
if redis.call('EXISTS', session) == 1 then
  return 0
end
local now = now_ms()
local ends_at = whole(now + SESSION_S * 1000)
redis.call('HSET', session, 'state', 'prepared', 'prepared_at', whole(now), 'until', ends_at, 'request', request,
  'spec', spec)
redis.call('EXPIRE', session, SESSION_S)
return ends_at
