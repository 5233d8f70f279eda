"""Measure how long journals need to be in order again after Redis was away, and what waits in memory meanwhile.

    python -m tests.benchmarks.outage [--streams 400] [--away 3]

One worker, one Valkey that is stopped for a while, and streams of 20 chunks a second that go on. `deploy/scaling.py`
simulates the same for sizes that do not run on one machine.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
import time
import urllib.request

import redis

from broker.store.embedded import embedded_valkey
from tests.benchmarks import processes
from tests.benchmarks.load import Work
from tests.benchmarks.upstream import Answer

LOOK_EVERY = 0.05
"""Seconds between two looks at the metrics of the worker."""

USUAL_LAG = 0.6
"""Seconds of lag that journals may have while nothing is wrong: the interval, and a tick."""

BEFORE = 4.0
"""Seconds from the first stream until Redis is stopped."""

PATIENCE = 60.0
"""Seconds to wait for the end of the lag."""


def metrics(port: int) -> dict[str, float]:
    """Return the values of a worker's metrics that have no labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return {
        name: float(value)
        for name, _, value in (line.partition(" ") for line in lines if line[:1] != "#" and "{" not in line)
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--streams", type=int, default=400)
    parser.add_argument("--away", type=float, default=3.0, help="seconds for which Redis is stopped")
    wanted = parser.parse_args()
    answer = Answer(round(20 * (BEFORE + wanted.away + 8)), 50_000)
    work = Work(answer, wanted.streams, wanted.streams, ramp=2)
    processes.raise_file_limit()
    cores = processes.split_cores()
    with embedded_valkey() as url, processes.running_upstream([answer]) as upstream:
        with redis.Redis.from_url(url) as client:
            server = int(client.info("server")["process_id"])
        with processes.running_broker(url, upstream.port, cores, {}) as broker:
            outcome = []
            loading = threading.Thread(
                target=lambda: outcome.append(processes.run_load("broker", broker.port, work, lambda _: None))
            )
            loading.start()
            time.sleep(BEFORE)
            os.kill(server, signal.SIGSTOP)
            time.sleep(wanted.away)
            waiting = metrics(broker.port)["broker_journal_bytes"]
            os.kill(server, signal.SIGCONT)
            returned = time.monotonic()
            while metrics(broker.port)["broker_journal_lag_seconds"] > USUAL_LAG:
                if time.monotonic() > returned + PATIENCE:
                    raise TimeoutError("the journals lag for too long")
                time.sleep(LOOK_EVERY)
            recovered = time.monotonic() - returned
            loading.join()
    lost = sum(outcome[0].lost.values())
    print(
        f"{wanted.streams} streams, redis stopped for {wanted.away:g} s: {waiting / 1e6:.1f} MB of events in memory, "
        f"in order again after {recovered:.2f} s, {lost} streams lost"
    )


if __name__ == "__main__":
    main()
