#!lua flags=allow-oom
-- Reads the marker that all workers know, made where there is none. It must pass in a full Redis as well.
-- Keys: marker, wiped
-- Args: new_marker
-- Constants: MARKER_S
-- Returns {marker, 1 where some worker has found lately that Redis came back empty, the time in ms}.
redis.call('SET', marker, new_marker, 'NX')
return {redis.call('GETEX', marker, 'EX', MARKER_S), redis.call('EXISTS', wiped), whole(now_ms())}
