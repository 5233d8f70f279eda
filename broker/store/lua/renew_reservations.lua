#!lua flags=allow-oom
-- hold: renews the leases of a worker's reservations, expired ones as well: while Redis was away nobody could. Notes
-- that they ran: whatever becomes of their sessions, they are not simply given back any more.
-- KEYS[1] all open ones, then of each reservation its record and its client's slots
-- ARGV: lease in ms, then the tokens
-- Returns the numbers, from 1, of those that are not open.
local now = redis.call('TIME')
local lease = now[1] * 1000 + math.floor(now[2] / 1000) + ARGV[1]
local closed = {}
for i = 2, #ARGV do
  local slots = KEYS[2 * i - 1]
  if redis.pcall('HGET', KEYS[2 * i - 2], 'state') == 'open' then  -- one that cannot be read stops no other
    redis.call('HSET', KEYS[2 * i - 2], 'ran', '1')
    redis.call('ZADD', KEYS[1], lease, ARGV[i])
    redis.call('ZADD', slots, lease, ARGV[i])
    redis.call('EXPIRE', slots, 259200)
  else
    closed[#closed + 1] = i - 1
  end
end
return closed
