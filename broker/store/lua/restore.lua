-- restore: (nothing) -> running, or the end that it had. An owner writes its session anew after Redis came back empty.
-- KEYS[1] session, [2] events
-- ARGV: token, worker, state, seconds to live, number of the first event held, number of the last, the events,
--       end event, end id, end data ('' while running), client, model, worst tokens, worst cost, prompt tokens
-- Returns 1, or 0 where the session is there.
if redis.call('EXISTS', KEYS[1]) == 1 then
  return 0
end
redis.call('HSET', KEYS[1], 'state', ARGV[3], 'token', ARGV[1], 'worker', ARGV[2], 'last', ARGV[6],
  'client', ARGV[11], 'model', ARGV[12], 'worst_tokens', ARGV[13], 'worst_cost', ARGV[14], 'prompt_tokens', ARGV[15])
if ARGV[8] ~= '' then
  redis.call('HSET', KEYS[1], 'end_event', ARGV[8], 'end_id', ARGV[9], 'end_data', ARGV[10])
end
redis.call('EXPIRE', KEYS[1], ARGV[4])
redis.call('DEL', KEYS[2])
if tonumber(ARGV[6]) >= tonumber(ARGV[5]) then
  redis.call('XADD', KEYS[2], '1-' .. ARGV[6], 'first', ARGV[5], 'events', ARGV[7])
  redis.call('EXPIRE', KEYS[2], ARGV[4])
end
return 1
