#!lua flags=allow-oom
-- Reads the marker that all workers know, and makes it if there is none. It must also work in a full Redis.
-- Keys: marker, wiped
-- Args: new_marker
-- Constants: MARKER_S
-- Returns {marker, 1 if a worker has noticed in the last seconds that Redis came back empty, the time in ms}.
redis.call('SET', marker, new_marker, 'NX')
return {redis.call('GETEX', marker, 'EX', MARKER_S), redis.call('EXISTS', wiped), whole(now_ms())}
