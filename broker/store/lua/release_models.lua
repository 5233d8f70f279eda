-- Gives the right to fetch the list of models back, if it is still the caller's. After a failure a note of it stays, for
-- all workers to wait out.
-- Keys: lock
-- Args: holder, failures (int), pause_ms
-- Returns 1, or 0 where the right was not the caller's any more.
if redis.call('GET', lock) ~= holder then
  return 0
elseif failures == 0 then
  redis.call('DEL', lock)
else
  redis.call('SET', lock, 'failed:' .. failures, 'PX', pause_ms)
end
return 1
