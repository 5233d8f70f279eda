-- hold: renews the leases of a worker's open reservations.
-- KEYS[1] all open ones, then the slots of each reservation's client; ARGV: lease in ms, then the tokens
local now = redis.call('TIME')
local lease = now[1] * 1000 + math.floor(now[2] / 1000) + ARGV[1]
for i = 2, #ARGV do
  redis.call('ZADD', KEYS[1], 'XX', lease, ARGV[i])
  redis.call('ZADD', KEYS[i], 'XX', lease, ARGV[i])
end
return 1
