-- (nothing) -> prepared. Stores a session with its request.
-- Keys: session, pending, total_pending
-- Args: request, spec, id_if_pending
-- Constants: SESSION_S
-- id_if_pending is the id of the session where the calls before count it as pending: then it is stored only if both
-- accounts have admitted it. Else it is empty, and the pending sessions are not read: in a cluster they are on other nodes.
-- Returns the time in ms until which it can be claimed, or 0 if the session exists already, or was not admitted.
if redis.call('EXISTS', session) == 1 then
  return 0
end
if id_if_pending ~= '' then
  for _, each in ipairs({pending, total_pending}) do
    if not redis.call('ZSCORE', each, id_if_pending) then
      return 0
    end
  end
end
local now = now_ms()
local ends_at = whole(now + SESSION_S * 1000)
redis.call('HSET', session, 'state', 'prepared', 'prepared_at', whole(now), 'until', ends_at, 'request', request,
  'spec', spec)
redis.call('EXPIRE', session, SESSION_S)
return ends_at
