-- Takes a hit in each window, if all of them have one left; else it takes none.
-- Keys: hits...
-- Args: rates...
-- hits has for each window the times of the hits, the latest first; rates has for each its limit and its seconds.
-- `take` and `look` are two scripts of the library `limits` as functions.
-- Returns {1 if there was a hit left, hits left, ms until the oldest leaves the window} for each window.
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000 -- in microseconds, so that two hits in one millisecond count as two
local found, all_admit = {}, true
for n, key in ipairs(hits) do
  local limit, window = tonumber(rates[2 * n - 1]), tonumber(rates[2 * n])
  local oldest, used = unpack(look({key}, {now - window, limit}) or {now, 0})
  found[n] = {key, limit, window, oldest, used}
  all_admit = all_admit and used < limit
end
for n, each in ipairs(found) do
  local key, limit, window, oldest, used = unpack(each)
  local admits = used < limit
  if all_admit then
    take({key}, {now, limit, window, 1})
    used = used + 1
  end
  found[n] = {admits and 1 or 0, limit - used, math.ceil(math.min(oldest + window - now, window) * 1000)}
end
return found
