-- Takes a hit if one is left, and reads how many are left.
-- Keys: hits
-- Args: limit (int), window (int)
-- hits has the times of the hits, the latest first; window is in seconds. `take` and `look` are two scripts of the
-- library `limits` as functions.
-- Returns {1 if taken, hits left, ms until the oldest leaves the window}.
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000 -- in microseconds, so that two hits in one millisecond count as two
local taken = take({hits}, {now, limit, window, 1})
-- If the hit was taken or refused, the window has at least one hit, so `look` finds one.
local oldest, used = unpack(look({hits}, {now - window, limit}))
return {taken and 1 or 0, limit - used, math.ceil(math.min(oldest + window - now, window) * 1000)}
