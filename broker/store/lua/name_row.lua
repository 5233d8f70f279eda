#!lua flags=allow-oom
-- Names a client and a model in the usage ledger of a day, which has a bounded number of names; the rest is 'other'.
-- Keys: clients, models
-- Args: client, model
-- Constants: MAX_CLIENTS, MAX_MODELS, LEDGER_S
-- Returns {client, model} as the ledger names them.
local function named(key, name, most)
  if name == 'other' or redis.call('SISMEMBER', key, name) == 1 then
    return name
  elseif redis.call('SCARD', key) >= most then
    return 'other'
  end
  redis.call('SADD', key, name)
  redis.call('EXPIRE', key, LEDGER_S)
  return name
end
return {named(clients, client, MAX_CLIENTS), named(models, model, MAX_MODELS)}
