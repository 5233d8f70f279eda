#!lua flags=allow-oom
-- renew: says that a worker lives. It must pass in a full Redis as well, or all workers would be taken for dead there.
-- KEYS[1] the worker's lease, [2] the marker, [3] the sign that Redis has just come back empty
-- ARGV: ms that the lease holds, seconds that the marker is kept, a marker for where there is none
-- Returns {marker, 1 where the sign is there}.
redis.call('SET', KEYS[1], '1', 'PX', ARGV[1])
redis.call('SET', KEYS[2], ARGV[3], 'NX')
return {redis.call('GETEX', KEYS[2], 'EX', ARGV[2]), redis.call('EXISTS', KEYS[3])}
