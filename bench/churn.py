"""Attaching and opening sockets: how often a second, and what a busy RX worker notices of it.

    python -m bench.churn --what bind       a UDP socket is opened and closed by one consumer
    python -m bench.churn --what attach     a process attaches to the dataplane and detaches
    python -m bench.churn --what lookups    packets looked up meanwhile, relative to without churn

The RX worker is on the first core and gets synthetic packets for 64 sockets as fast as it takes them: each is looked up
in the table that is being changed. Their consumer, the supervisor and the process that opens and closes are on the
second core. `bind` and `attach` are measured without traffic, the worker asleep; with `--busy`, beside it.

For `lookups` the consumer is stopped (SIGSTOP) and its rings are full, so that each packet is looked up and dropped:
otherwise the worker's rate depends above all on how much of the second core is left to the consumer. Times with and
without churn take turns; the figure is the worker's rate with, divided by its rate without, right before.

At the end the ledger has to balance, the consumer must have got exactly what was delivered, and nothing may have
been dropped but for full rings: no lookup ever missed an open socket.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

import dataplane
from bench import harness
from tests.netns import Forked

SOCKETS, FIRST_PORT = 64, 5000
CHURN_PORT = 9000           # of no packet
UNITS = {"bind": "sockets/s", "attach": "attachments/s", "lookups": "of undisturbed"}

CONFIG = """
name = "{name}"
[rx]
cores = [{core}]
idle = "{idle}"
[sockets]
max = 1024
[[netif]]
kind = "synthetic"
flows = 1024
local_ports = [5000, 5063]
start = {start}
"""


@njit
def count(payload: Any, info: Any, state: Any) -> None:
    """One packet more for its socket."""
    state[info.socket] += 1


def consume(name: str, ready: int) -> int:
    """The consumer of all packets, until the dataplane has ended: how many it got."""
    counts = np.zeros(SOCKETS, np.int64)
    with dataplane.attach(name) as dp:
        socks = [dp.udp("0.0.0.0", FIRST_PORT + i) for i in range(SOCKETS)]
        with dp.poller(socks) as poller, contextlib.suppress(dataplane.Stopped):
            poller.consume(count, counts, timeout=0)    # compiled before the packets come
            os.write(ready, b"x")
            while True:
                poller.consume(count, counts, max_packets=1 << 22)
    return int(counts.sum())


def bind(dp: dataplane.Dataplane) -> None:
    """One socket, opened and closed."""
    dp.udp("0.0.0.0", CHURN_PORT).close()


def attach(dp: dataplane.Dataplane) -> None:
    """One attachment more of this process, and its end."""
    dataplane.attach(dp.name).close()


def churned(dp: dataplane.Dataplane, once: Callable[[dataplane.Dataplane], None], seconds: float) -> float:
    """Does it for so long: times a second."""
    start = now = time.monotonic()
    times = 0
    while now < start + seconds:
        once(dp)
        times += 1
        now = time.monotonic()
    return times / (now - start)


def offered(dp: dataplane.Dataplane) -> tuple[float, int]:
    """When, and how many packets the worker has looked up until then."""
    return time.monotonic(), dp.stats()["offered"]


def rate(before: tuple[float, int], after: tuple[float, int]) -> float:
    """Packets a second between two looks."""
    return (after[1] - before[1]) / (after[0] - before[0])


def lookups(dp: dataplane.Dataplane, consumer: Forked,
            options: argparse.Namespace) -> tuple[list[float], dict[str, Any]]:
    """The worker's rate with churn, relative to without; by turns, while the consumer is stopped."""
    values, plain, churns = [], [], []
    os.kill(consumer.pid, signal.SIGSTOP)
    try:
        churned(dp, bind, options.seconds / 2)
        for _ in range(options.repeats):
            before = offered(dp)
            time.sleep(options.seconds)
            between = offered(dp)
            churns.append(churned(dp, bind, options.seconds))
            plain.append(rate(before, between))
            values.append(rate(between, offered(dp)) / plain[-1])
    finally:
        os.kill(consumer.pid, signal.SIGCONT)
    return values, {"lookups_mpps": round(statistics.median(plain) / 1e6, 2), "binds": round(statistics.median(churns))}


def run(options: argparse.Namespace, busy: bool) -> tuple[list[float], dict[str, Any]]:
    """One dataplane, all repeats."""
    core = (harness.CORES * 2)[1]
    config = CONFIG.replace("{core}", str(harness.CORES[0])).replace("{idle}", "busy" if busy else "adaptive")
    listen, ready = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, listen)
        stack.callback(os.close, ready)
        at = stack.enter_context(harness.running(config.replace("{start}", str(SOCKETS + 1 if busy else 1000))))
        os.sched_setaffinity(at.process.pid, [core])
        harness.pin(core)
        consumer = harness.fork(core, consume, at.name, ready)
        stack.callback(consumer.kill)
        assert select.select([listen], [], [], 20)[0], "the consumer did not start"
        with dataplane.attach(at.name) as dp, dp.udp(remote=("192.0.2.254", 9)):
            once = attach if options.what == "attach" else bind
            churned(dp, once, options.seconds / 2)    # warm
            if options.what == "lookups":
                values, more = lookups(dp, consumer, options)
            else:
                values, more = [churned(dp, once, options.seconds) for _ in range(options.repeats)], {}
        at.process.send_signal(signal.SIGINT)
        got = consumer.result(30)
        at.wait()
        check(at.ledger, got)
    return values, more


def check(ledger: dict[str, Any], got: int) -> None:
    """All packets found their sockets, and the consumer."""
    assert ledger["balanced"] and got == ledger["delivered"] == ledger["consumed"], (got, ledger)
    assert set(ledger["dropped"]) <= {"pcq_full"} and ledger["unread"] == 0, ledger


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--what", choices=list(UNITS), default="bind")
    parser.add_argument("--busy", action="store_true", help="bind and attach beside traffic")
    parser.add_argument("--seconds", type=float, default=0.4, help="of each repeat")
    options = parser.parse_args()
    values, more = run(options, options.busy or options.what == "lookups")
    harness.report(f"churn.{options.what}", UNITS[options.what], values, options, **more)


if __name__ == "__main__":
    harness.run(main)
