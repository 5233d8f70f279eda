-- append: running -> running. The owner journals events, and learns what others want of the session.
-- KEYS[1] session, [2] events, [3] viewers
-- ARGV: token, number of the first event, number of the last, the events, seconds to live, prefix of the bells
-- With no events (last < first) it only asks.
-- Returns one line, because it is read so often: state, last journaled, 1 if a cancel waits, viewers on other workers.
-- Any state but running says that the session is not the caller's.
-- Events that do not follow on the last journaled are not written: the owner sends again from there.
local state, token, last, cancel = unpack(redis.call('HMGET', KEYS[1], 'state', 'token', 'last', 'cancel'))
last = tonumber(last or 0)
if state ~= 'running' or token ~= ARGV[1] then
  return redis.status_reply((state == 'running' and 'lost' or state or 'gone') .. ' ' .. string.format('%.0f', last) .. ' 0 0')
end
local first, newest = tonumber(ARGV[2]), tonumber(ARGV[3])
local fresh = newest >= first and first <= last + 1 and newest > last
if fresh then
  -- The first of all writes: a full Redis refuses it and with it the rest, and nothing else here would be refused.
  redis.call('XADD', KEYS[2], '1-' .. ARGV[3], 'first', ARGV[2], 'events', ARGV[4])
  redis.call('HSET', KEYS[1], 'last', ARGV[3])
  if redis.call('XLEN', KEYS[2]) == 1 then
    redis.call('EXPIRE', KEYS[2], ARGV[5])
  end
  last = newest
end
redis.call('HDEL', KEYS[1], 'request')
local now = redis.call('TIME')
local viewers = redis.call('ZRANGEBYSCORE', KEYS[3], now[1] * 1000 + math.floor(now[2] / 1000), '+inf')
if fresh then
  for _, worker in ipairs(viewers) do
    redis.pcall('PUBLISH', ARGV[6] .. worker, 'news ' .. string.match(KEYS[1], '{(.-)}') .. ' ' .. ARGV[2] .. ' ' .. ARGV[3] .. '\n' .. ARGV[4])
  end
end
return redis.status_reply('running ' .. string.format('%.0f', last) .. ' ' .. (cancel and 1 or 0) .. ' ' .. #viewers)
