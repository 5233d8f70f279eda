-- claim: prepared -> running. Exactly one token wins, and asking again with it gets the same answer; but not once a
-- cancel was accepted, nor where the claim was refused because its reservation was given back.
-- KEYS[1] session; ARGV: token, worker, seconds to live from now on
-- Returns {'won', request, model, prompt tokens, referer, client, worst tokens, worst cost, text bytes, flat tokens},
-- {'cancel'} where it had won and was cancelled since, or {state, worker, end event, end id, end data}.
local state, token, worker, cancel = unpack(redis.call('HMGET', KEYS[1], 'state', 'token', 'worker', 'cancel'))
if not state then
  return {'gone'}
end
if state == 'prepared' and redis.call('HEXISTS', KEYS[1], 'refused:' .. ARGV[1]) == 0 then
  redis.call('HSET', KEYS[1], 'state', 'running', 'token', ARGV[1], 'worker', ARGV[2])
  redis.call('EXPIRE', KEYS[1], ARGV[3])
elseif state ~= 'running' or token ~= ARGV[1] then
  return {state, worker or '', unpack(redis.call('HMGET', KEYS[1], 'end_event', 'end_id', 'end_data'))}
elseif cancel then
  return {'cancel'}
end
return {'won', unpack(redis.call('HMGET', KEYS[1], 'request', 'model', 'prompt_tokens', 'referer', 'client',
  'worst_tokens', 'worst_cost', 'text_bytes', 'flat_tokens'))}
