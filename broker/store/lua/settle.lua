#!lua flags=allow-oom
-- Replaces a reservation by its usage exactly once, or an estimate that was settled before by the final usage. A
-- generation that ran although its reservation was released is booked as well. While the final usage can still be
-- learned, the rest above the estimate stays reserved, so that later claims leave room for it.
-- Keys: reservation, account, slots, open, ledger, estimates
-- Args: claim_id, day (int), outcome, row, generation, prompt (int), completion (int), cached (int), reasoning (int),
--     cost (int), estimated (int), unpriced (int)
-- Constants: RECORD_S, ACCOUNT_S, LEDGER_S, ASK_MS
-- outcome is 'done', 'cancelled' or 'failed', or '' to correct an estimate and nothing else. row is
-- '<client>\31<model>' with the names of the usage ledger, or '' for an account without rows. generation is the
-- upstream's id of the generation if it can be asked for the final usage, else ''. After ASK_MS any worker may ask;
-- only accounts with rows note that.
-- Returns {1 if it changed something, the cost that counts, the generation id that is noted with an estimate, or ''}.
local METRICS = {'prompt', 'completion', 'cached', 'reasoning', 'cost', 'estimated', 'unpriced'}
local used = {prompt, completion, cached, reasoning, cost, estimated, unpriced}
local record = {}
local fields = {'state', 'day', 'tokens', 'cost', 'kept_tokens', 'kept_cost', 'booked', 'row', 'generation',
  'month'}
for i, value in ipairs(redis.call('HMGET', reservation, unpack(fields))) do
  record[fields[i]] = value
end
local settled = record.state == 'settled'
local before = {0, 0, 0, 0, 0, 0, 0}
if settled then
  local i = 0
  for number in string.gmatch(record.booked, '%d+') do
    i = i + 1
    before[i] = tonumber(number)
  end
end
local function note_estimate()
  if estimated == 0 then
    redis.call('ZREM', estimates, claim_id)
  elseif generation ~= '' then
    record.generation = generation
    redis.call('HSET', reservation, 'generation', generation)
    redis.call('HSETNX', reservation, 'ended', whole(now_ms()))
    if row ~= '' then
      redis.call('ZADD', estimates, 'NX', now_ms() + ASK_MS, claim_id)
      redis.call('EXPIRE', estimates, RECORD_S)
    end
  end
end
if settled and (before[6] == 0 or estimated == 1) then
  if before[6] == 1 then
    note_estimate() -- the worker that settled it first may not have known by which id to ask
  end
  return {0, before[5], record.generation or ''}
elseif not settled and outcome == '' then
  return {0, cost, ''}
end
day = tonumber(record.day) or day
row = record.row or row -- a correction changes the row that was counted
-- The total has neither rows nor months.
local month, _, month_before = month_of(day)
local periods = row ~= '' and {day, month} or {day}
-- The amounts that are reserved now, and those that stay reserved.
local tokens_now, cost_now = tonumber(record.kept_tokens or 0), tonumber(record.kept_cost or 0)
local tokens_kept, cost_kept = 0, 0
if record.state == 'open' then
  tokens_now, cost_now = tonumber(record.tokens), tonumber(record.cost)
  if estimated == 1 and generation ~= '' then
    tokens_kept = math.max(0, tokens_now - prompt - completion)
    cost_kept = math.max(0, cost_now - cost)
  end
end
change(account, day, 'reserved_tokens', tokens_kept - tokens_now)
change(account, day, 'reserved_cost', cost_kept - cost_now)
if record.month then
  change(account, record.month, 'reserved_cost', cost_kept - cost_now)
end
change(account, day, 'spent_tokens', prompt + completion - before[1] - before[2])
local is_new_day = false
for _, period in ipairs(periods) do
  change(account, period, 'spent_cost', cost - before[5])
  for i, name in ipairs({'prompt', 'completion'}) do
    change(account, period, name, used[i] - before[i])
  end
  change(account, period, 'estimated', estimated - before[6])
  if not settled then
    local requests = redis.call('HINCRBY', account, period .. ':requests', 1)
    is_new_day = is_new_day or period == day and requests == 1
  end
end
if is_new_day then
  -- The key of an account that is used every month never expires, so its old values are deleted once a day. A late
  -- settlement may still be of the day or the month before.
  for _, field in ipairs(redis.call('HKEYS', account)) do
    local period = string.match(field, '^[^:]*')
    local old_day = tonumber(period)
    if old_day and old_day < day - 3 or not old_day and period < month_before then
      redis.call('HDEL', account, field)
    end
  end
end
keep_account(account, ACCOUNT_S, row ~= '', now_ms())
if row ~= '' then
  for i, name in ipairs(METRICS) do
    if used[i] ~= before[i] then
      redis.call('HINCRBY', ledger, row .. '\31' .. name, whole(used[i] - before[i]))
    end
  end
  if not settled then
    redis.call('HINCRBY', ledger, row .. '\31requests', 1)
    if outcome ~= 'done' then
      redis.call('HINCRBY', ledger, row .. '\31' .. outcome, 1)
    end
  end
  redis.call('EXPIRE', ledger, LEDGER_S)
end
for i, number in ipairs(used) do
  used[i] = whole(number)
end
redis.call('HSET', reservation, 'state', 'settled', 'day', day, 'booked', table.concat(used, ' '), 'row', row,
  'kept_tokens', whole(tokens_kept), 'kept_cost', whole(cost_kept))
redis.call('EXPIRE', reservation, RECORD_S)
redis.call('SREM', slots, claim_id)
redis.call('ZREM', open, claim_id)
note_estimate()
return {1, cost, record.generation or ''}
