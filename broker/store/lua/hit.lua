-- Takes a hit if one is left, and looks at the rest.
-- Keys: hits
-- Args: limit (int), window (int)
-- hits has the times of the hits, the latest first; window is in seconds. `take` and `look` are scripts of the library
-- `limits`, made functions.
-- Returns {1 if taken, hits left, ms until the oldest leaves the window}.
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000 -- two hits of one millisecond are two
local taken = take({hits}, {now, limit, window, 1})
-- Taken or refused, there is a hit in the window by now, so that `look` finds one.
local oldest, used = unpack(look({hits}, {now - window, limit}))
return {taken and 1 or 0, limit - used, math.ceil(math.min(oldest + window - now, window) * 1000)}
