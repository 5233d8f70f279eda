#!lua flags=allow-oom
-- names: agrees with all workers on the secret that clients are named with. It has no TTL. Of two secrets, after Redis
-- came back empty, the older one stays: more has been named with it.
-- KEYS[1] the secret; ARGV: the one that this worker knows ('' for none), a random word for a new one
-- Returns the one that counts: the unix time in ms at which it was made, in 13 digits, a colon, a random word.
local kept, known = redis.call('GET', KEYS[1]), ARGV[1]
if kept and (known == '' or kept <= known) then
  return kept
end
if known == '' then
  local now = redis.call('TIME')
  known = string.format('%013.0f', now[1] * 1000 + math.floor(now[2] / 1000)) .. ':' .. ARGV[2]
end
redis.call('SET', KEYS[1], known)
return known
