-- (nothing) -> prepared. Stores a session with its request.
-- Keys: session
-- Args: request, spec
-- Constants: SESSION_S
-- Returns 1, or 0 where there is such a session.
if redis.call('EXISTS', session) == 1 then
  return 0
end
local now = now_ms()
redis.call('HSET', session, 'state', 'prepared', 'prepared_at', whole(now), 'until', whole(now + SESSION_S * 1000),
  'request', request, 'spec', spec)
redis.call('EXPIRE', session, SESSION_S)
return 1
