-- Releases the lock to fetch the list of models, if the caller still has it. After a failure, a note stays in its place
-- until all workers may try again.
-- Keys: lock
-- Args: holder, failures (int), pause_ms
-- Returns 1, or 0 if the caller did not have the lock any more.
if redis.call('GET', lock) ~= holder then
  return 0
elseif failures == 0 then
  redis.call('DEL', lock)
else
  redis.call('SET', lock, 'failed:' .. failures, 'PX', pause_ms)
end
return 1
