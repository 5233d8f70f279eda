#!lua flags=allow-oom
-- Removes a session from the pending ones of an account, and from the line.
-- Keys: pending, sizes, line, due, reservation
-- Args: session, before_ms (int)
-- before_ms is given where the outcome of the claim is not known: then nothing is removed unless the claim could win, see
-- claim.lua. Else it is 0, and the reservation is not read.
-- Returns 1 if it was pending, else 0.
if before_ms > 0 and (now_ms() >= before_ms or redis.call('HGET', reservation, 'state') ~= 'open') then
  return 0
end
redis.call('ZREM', line, session)
redis.call('ZREM', due, session)
return forget(pending, sizes, session)
