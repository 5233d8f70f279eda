-- Functions of several scripts. This text is put before each script when it is loaded, followed by local names for the
-- keys and arguments in the header of the script.

-- The clock of Redis, in milliseconds.
local function now_ms()
  local now = redis.call('TIME')
  return now[1] * 1000 + math.floor(now[2] / 1000)
end

-- Format a whole number for Redis. Lua would write 17 digits and more as 1e+17. Lua also has a negative zero, which
-- Redis 7.0 does not accept as an integer: adding 0 makes it positive.
local function whole(number)
  return string.format('%.0f', number + 0)
end

-- Notify a worker about a session. If the Redis user has no rights to channels, the rest of the script still runs.
local function notify(channels, worker, kind, session, text)
  redis.pcall('PUBLISH', channels .. worker, kind .. ' ' .. string.match(session, '{(.-)}') .. (text or ''))
end

-- Return the workers that are registered as watching a session.
local function watching(viewers)
  return redis.call('ZRANGEBYSCORE', viewers, now_ms(), '+inf')
end

-- Add the events first to newest to a journal that ends at last.
-- Returns the new last number, or nil if events are missing before the first.
local function append(session, events, last, first, newest, batch)
  if newest <= last then
    return last
  elseif first > last + 1 then
    return nil
  end
  redis.call('XADD', events, '1-' .. whole(newest), 'first', whole(first), 'events', batch)
  redis.call('HSET', session, 'last', whole(newest))
  return newest
end

-- Write the end of a session, and notify the workers that watch it. The journal is stored for replay_s, the end for
-- keep_s.
local function write_end(session, events, viewers, ending, keep_s, replay_s, channels)
  redis.call('HDEL', session, 'request') -- first: after a write that a full Redis accepts, it accepts the others
  redis.call('HSET', session, 'state', ending.state, 'end_event', ending.event, 'end_id', ending.id,
    'end_data', ending.data)
  redis.call('EXPIRE', session, keep_s)
  if redis.call('EXPIRE', events, replay_s) == 1 then
    redis.call('HSET', session, 'replayed', '1') -- while its journal exists
  end
  local told = watching(viewers)
  redis.call('DEL', viewers)
  for _, worker in ipairs(told) do
    notify(channels, worker, 'ended', session)
  end
end

-- Return the status of a session: {state or 'gone', worker, end event, end id, end data}.
local function status(session)
  local state, worker, event, id, data =
    unpack(redis.call('HMGET', session, 'state', 'worker', 'end_event', 'end_id', 'end_data'))
  return {state or 'gone', worker or '', event or '', id or '', data or ''}
end

-- Return whether another claim of the same session has one of the client's slots. It reads all slots, so it is called
-- for the account of a client alone: the total may have thousands, and a claim with a slot of the total has one of the
-- client.
local function claimed_by_another(reservation, claim_id, slots, session)
  local records = string.sub(reservation, 1, #reservation - #claim_id)
  for _, other in ipairs(redis.call('SMEMBERS', slots)) do
    if other ~= claim_id and redis.call('HGET', records .. other, 'session') == session then
      return true
    end
  end
  return false
end

-- Add to a value of an account for a day. A change of 0 writes nothing.
local function change(account, day, name, amount)
  if amount ~= 0 then
    redis.call('HINCRBY', account, day .. ':' .. name, whole(amount))
  end
end

-- Remove a session from the pending ones of an account. Returns 1 if it was among them, else 0.
local function forget(pending, sizes, session)
  local size, client = string.match(redis.call('HGET', sizes, session) or '', '^(%d+) (.*)$')
  if size then
    redis.call('HDEL', sizes, session)
    redis.call('HINCRBY', sizes, 'total', whole(0 - size))
    if redis.call('HINCRBY', sizes, 'of:' .. client, whole(0 - size)) <= 0 then
      redis.call('HDEL', sizes, 'of:' .. client)
    end
  end
  return redis.call('ZREM', pending, session)
end
