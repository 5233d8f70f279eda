-- Keeps the lock to fetch the list of models, if the caller still has it.
-- Keys: lock
-- Args: holder, ttl_ms
-- Returns 1, or 0 if the caller did not have the lock any more.
if redis.call('GET', lock) ~= holder then
  return 0
end
return redis.call('PEXPIRE', lock, ttl_ms)
