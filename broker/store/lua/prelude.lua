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
-- In a cluster, `told` collects the notifications instead, and the caller sends them.
local function notify(channels, worker, kind, session, text)
  local message = kind .. ' ' .. string.match(session, '{(.-)}') .. (text or '')
  if told then
    told[#told + 1] = channels .. worker
    told[#told + 1] = message
  else
    redis.pcall('PUBLISH', channels .. worker, message)
  end
end

-- Return the workers that are registered as watching a session.
local function watching(viewers)
  return redis.call('ZRANGEBYSCORE', viewers, now_ms(), '+inf')
end

-- Add the events first to newest to a journal that ends at last, and count their bytes.
-- Returns the new last number, or nil if events are missing before the first.
local function append(session, events, last, first, newest, batch)
  if newest <= last then
    return last
  elseif first > last + 1 then
    return nil
  end
  redis.call('XADD', events, '1-' .. whole(newest), 'first', whole(first), 'events', batch)
  redis.call('HSET', session, 'last', whole(newest))
  redis.call('HINCRBY', session, 'bytes', #batch)
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

-- Return the calendar month of a day (days since 1970, UTC) as 'YYYY-MM', the first day of the next month, and the
-- month before. https://howardhinnant.github.io/date_algorithms.html#civil_from_days
local function month_of(day)
  local of_era = (day + 719468) % 146097
  local years = math.floor(
    (of_era - math.floor(of_era / 1460) + math.floor(of_era / 36524) - math.floor(of_era / 146096)) / 365)
  local since_march = of_era - (365 * years + math.floor(years / 4) - math.floor(years / 100))
  local months = math.floor((5 * since_march + 2) / 153) -- since March, which is 0
  local date = since_march - math.floor((153 * months + 2) / 5) + 1
  local month = months < 10 and months + 3 or months - 9
  local year = years + math.floor((day + 719468) / 146097) * 400 + (month <= 2 and 1 or 0)
  local is_leap = year % 4 == 0 and (year % 100 ~= 0 or year % 400 == 0)
  local length = ({31, is_leap and 29 or 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31})[month]
  local before = month > 1 and {year, month - 1} or {year - 1, 12}
  return string.format('%04d-%02d', year, month), day - date + 1 + length,
    string.format('%04d-%02d', unpack(before))
end

-- Add to a value of an account for a period: a day, or a month as 'YYYY-MM'. A change of 0 writes nothing.
local function change(account, period, name, amount)
  if amount ~= 0 then
    redis.call('HINCRBY', account, period .. ':' .. name, whole(amount))
  end
end

-- Store an account for so many seconds; that of a client until so long after the end of this month. now is in ms.
local function keep_account(account, seconds, is_client, now)
  if is_client then
    local now_s = math.floor(now / 1000)
    local _, month_end = month_of(math.floor(now_s / 86400))
    seconds = seconds + month_end * 86400 - now_s
  end
  redis.call('EXPIRE', account, seconds)
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
