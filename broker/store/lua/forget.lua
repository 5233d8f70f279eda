#!lua flags=allow-oom
-- Removes a session from the pending ones of an account, and from the line.
-- Keys: pending, sizes, line, due
-- Args: session
-- Returns 1 if it was pending, else 0.
redis.call('ZREM', line, session)
redis.call('ZREM', due, session)
return forget(pending, sizes, session)
