-- (nothing) -> prepared. Stores a session with its request. A repeat changes nothing and gets the same answer.
-- Keys: session
-- Args: request, spec, before_ms (int)
-- Constants: SESSION_S
-- before_ms is the time, in ms by this clock, from which on nothing is done; 0 for none.
-- Returns the time in ms until which it can be claimed; 0 if it is too late, or if that is not known of one that exists.
local now = now_ms()
if before_ms > 0 and now >= before_ms then
  return 0
end
if redis.call('EXISTS', session) == 1 then
  return redis.call('HGET', session, 'until') or 0
end
local ends_at = whole(now + SESSION_S * 1000)
redis.call('HSET', session, 'state', 'prepared', 'prepared_at', whole(now), 'until', ends_at, 'request', request,
  'spec', spec)
redis.call('EXPIRE', session, SESSION_S)
return ends_at
