#!lua flags=allow-oom
-- Agrees with all workers on the secret from which the names of clients are made. It has no TTL. If there are two
-- secrets after Redis came back empty, the older one counts, because more names were made from it.
-- Keys: secret
-- Args: known, random_word
-- known is the secret that this worker knows, '' for none. A secret is the unix time in ms at which it was made, in 13
-- digits, a colon, and a random word.
-- Returns the secret that counts.
local stored = redis.call('GET', secret)
if stored and (known == '' or stored <= known) then
  return stored
elseif known == '' then
  known = string.format('%013.0f', now_ms()) .. ':' .. random_word
end
redis.call('SET', secret, known)
return known
