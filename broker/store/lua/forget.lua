#!lua flags=allow-oom
-- Removes a session from the pending ones of an account, and from the line.
-- Keys: pending, sizes, line, due, reservation
-- Args: session, only_if_reserved (int)
-- only_if_reserved is 1 where the outcome of its claim is not known: then nothing is removed unless the reservation of
-- the claim is open. Else it is 0, and the reservation is not read.
-- Returns 1 if it was pending, else 0.
if only_if_reserved == 1 and redis.call('HGET', reservation, 'state') ~= 'open' then
  return 0
end
redis.call('ZREM', line, session)
redis.call('ZREM', due, session)
return forget(pending, sizes, session)
