#!lua flags=allow-oom
-- A session of an account is not pending any more.
-- Keys: pending, sizes
-- Args: session
-- Returns 1 if it was pending, else 0.
return forget(pending, sizes, session)
