-- Give back the right to fetch the list of models, if it is still ours. After a failure it becomes word of it, for all
-- workers to wait out.
-- KEYS[1] lock; ARGV: token, failures in a row (0: none), milliseconds to wait after them
-- Returns 1, or 0 where the lock was not ours any more.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
if ARGV[2] == '0' then
  redis.call('DEL', KEYS[1])
else
  redis.call('SET', KEYS[1], 'failed:' .. ARGV[2], 'PX', ARGV[3])
end
return 1
