"""Traces, and metrics under the names of OpenTelemetry's conventions for generative AI. Off unless they are configured.

`interface` is what the other parts see; it needs no library. `otel` needs the extra `otel`, and is imported only where
traces are on. No prompt, no answer and no whole session id is in a span.
"""
