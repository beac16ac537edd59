"""Continuations: deferred protocol work with a deadline, for connections whose owner does not call in.

RX workers call `kcont_schedule`. The continuation worker (workers/continuation.py) has everything else: a timer wheel
(`wheel`) in private memory (`area`), fed through a pcq (`schedule`), and the end of connections (`reaper`).
The protocol itself is run by inet/tcp_continue.py, a floor up.
"""

from dataplane.kcont.schedule import kcont_schedule

__all__ = ["kcont_schedule"]
