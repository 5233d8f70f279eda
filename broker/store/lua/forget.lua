#!lua flags=allow-oom
-- A session of an account is not pending any more, and does not wait for a slot.
-- Keys: pending, sizes, line, due
-- Args: session
-- Returns 1 if it was pending, else 0.
redis.call('ZREM', line, session)
redis.call('ZREM', due, session)
return forget(pending, sizes, session)
