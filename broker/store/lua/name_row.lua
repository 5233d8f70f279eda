#!lua flags=allow-oom
-- Returns the names of a client and a model in the usage ledger of a day. The number of names is bounded; all others
-- are 'other'.
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
