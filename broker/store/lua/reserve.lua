-- Reserves a slot and the worst case of one generation in an account, or nothing. A repeat with the same claim gets the
-- same answer, and renews the lease.
-- Keys: reservation, account, slots, open, line, due
-- Args: claim_id, session, spec, tokens (int), cost (int), running_since, may_wait (int), ends_ms (int),
--     max_streams (int), max_tokens (int), max_cost (int), max_month_cost (int)
-- Constants: LEASE_MS, ACCOUNT_S, PLACE_MS, LATE_MS, MIN_RETRY_MS, MAX_RETRY_MS, RETRY_STEP_MS, NEAR, ONE_CLIENT
-- running_since is empty at a claim. For a running generation it is the day of its claim, or 0 for today: then it is
-- reserved despite the limits, and even if it was released.
-- The record has the time of the claim as 'since', in ms; empty if it was written again, when that is not known.
-- ends_ms is when the session and its place expire; 0 if not known.
-- line has the sessions that wait for a slot of the client, in their order; due has the ms by which the page of each
-- should have come back. A free slot is left for each page in front that is not overdue.
-- max_tokens and max_cost are for the day, max_month_cost for the calendar month; 0 is no limit.
-- ONE_CLIENT is 0 for the total, which never answers 'claiming' and has no months.
-- Returns {'ok', day, ms in line}, {'closed'} for a reservation that was released or settled, {'claiming'} if another
-- claim of the session has taken the room, {'queued', position, length of the line, ms after which to come back}, or
-- {'streams' | 'tokens' | 'cost' | 'month', seconds until this may change, 1 if it would not fit even without
-- reservations}.
local now = now_ms()
local state, day, waited = unpack(redis.call('HMGET', reservation, 'state', 'day', 'waited_ms'))
if state == 'open' then
  redis.call('ZADD', open, now + LEASE_MS, claim_id)
  redis.call('SADD', slots, claim_id)
  return {'ok', tonumber(day), tonumber(waited or 0)}
elseif state == 'settled' or state and running_since == '' then
  return {'closed'}
end
local today = math.floor(now / 86400000)
day = tonumber(running_since) or 0
if day == 0 then
  day = today
end
-- Remove the places of pages that have not come back. This must come after the first write that a full Redis refuses:
-- it refuses no write that comes after an accepted one.
local function drop_gone()
  for _, gone in ipairs(redis.call('ZRANGEBYSCORE', due, '-inf', now - PLACE_MS)) do
    redis.call('ZREM', line, gone)
    redis.call('ZREM', due, gone)
  end
end
local month, month_end = month_of(day)
-- Nearly always nobody waits. Then the steps of the line are left out, which are a quarter of the work.
local has_line = redis.call('ZCARD', line) > 0
-- Return why a budget leaves no room now, or nil. If one leaves none even without reservations, waiting does not help,
-- so that one is the reason.
local function beyond_budgets()
  local reason
  for _, budget in ipairs({
    {'month', month, 'cost', cost, max_month_cost, month_end},
    {'tokens', day, 'tokens', tokens, max_tokens, day + 1},
    {'cost', day, 'cost', cost, max_cost, day + 1},
  }) do
    local kind, period, unit, amount, limit, ends = unpack(budget)
    if limit > 0 then
      local spent = tonumber(redis.call('HGET', account, period .. ':spent_' .. unit) or 0)
      local reserved = tonumber(redis.call('HGET', account, period .. ':reserved_' .. unit) or 0)
      local final = spent + amount > limit
      if spent + reserved + amount > limit and (final or not reason) then
        reason = {kind, ends * 86400 - math.floor(now / 1000), final and 1 or 0}
        if final then
          return reason
        end
      end
    end
  end
  return reason
end
local function due_at(other)
  return tonumber(redis.call('ZSCORE', due, other) or 0)
end
-- Return the position of the session in line (or the next one), and for how many pages in front a slot is left.
local function place()
  if not has_line then
    return 1, 0
  end
  local before = due_at(session) >= now - PLACE_MS and redis.call('ZRANK', line, session) or redis.call('ZCARD', line)
  local position, kept = 1, 0
  for _, other in ipairs(before > 0 and redis.call('ZRANGE', line, 0, before - 1) or {}) do
    if other ~= session and due_at(other) >= now - PLACE_MS then
      position = position + 1
      kept = kept + (due_at(other) >= now and 1 or 0)
    end
  end
  return position, kept
end
local function wait_in_line(position)
  if due_at(session) < now - PLACE_MS then -- new, or removed from the line
    local last = redis.call('ZREVRANGE', line, 0, 0, 'WITHSCORES')[2]
    redis.call('ZADD', line, whole(math.max(now, (last or 0) + 1)), session)
  end
  local retry = math.min(MAX_RETRY_MS, MIN_RETRY_MS + RETRY_STEP_MS * math.max(0, position - NEAR))
  local due_ms = now + retry + LATE_MS
  if ends_ms > 0 then
    due_ms = math.min(due_ms, ends_ms - PLACE_MS)
  end
  redis.call('ZADD', due, whole(due_ms), session)
  drop_gone()
  for _, key in ipairs({line, due}) do
    redis.call('PEXPIRE', key, MAX_RETRY_MS + LATE_MS + PLACE_MS)
  end
  return {'queued', position, redis.call('ZCARD', line), retry}
end
local function is_claiming()
  return ONE_CLIENT == 1 and claimed_by_another(reservation, claim_id, slots, session)
end
if running_since == '' then
  -- A slot with an expired lease counts until its reservation is settled or released: after an outage of Redis its
  -- worker may be alive and only could not renew it.
  local position, kept = place()
  if redis.call('SCARD', slots) + kept >= max_streams then
    if is_claiming() then
      return {'claiming'}
    elseif may_wait == 1 then
      return wait_in_line(position)
    end
    return {'streams', 5, 0}
  end
  local reason = beyond_budgets()
  if reason then
    return is_claiming() and {'claiming'} or reason
  end
end
waited = 0
if has_line and due_at(session) >= now - PLACE_MS then
  waited = math.max(0, now - tonumber(redis.call('ZSCORE', line, session) or now))
end
redis.call('HSET', reservation, 'state', 'open', 'session', session, 'spec', spec, 'tokens', whole(tokens),
  'cost', whole(cost), 'day', day, 'waited_ms', whole(waited),
  'since', running_since == '' and whole(now) or '', unpack(ONE_CLIENT == 1 and {'month', month} or {}))
if has_line then
  redis.call('ZREM', line, session)
  redis.call('ZREM', due, session)
  drop_gone()
end
change(account, day, 'reserved_tokens', tokens)
change(account, day, 'reserved_cost', cost)
if ONE_CLIENT == 1 then
  change(account, month, 'reserved_cost', cost)
end
redis.call('SADD', slots, claim_id)
redis.call('ZADD', open, now + LEASE_MS, claim_id)
for _, key in ipairs({reservation, slots, open}) do
  redis.call('EXPIRE', key, ACCOUNT_S)
end
keep_account(account, ACCOUNT_S, ONE_CLIENT == 1, now)
return {'ok', day, waited}
