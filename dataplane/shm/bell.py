"""A bell: a pipe that says "look", between processes that do not trust each other.

Used for event loops (a worker rings, a consumer listens) and as a worker's doorbell (consumers ring, the
worker listens). Not an eventfd: whoever holds one shares a single open file description with all others,
can clear its O_NONBLOCK and fill its counter, and then the next write of an RX worker blocks for ever.
Here each end has a description of its own, so that nobody can change how another's end behaves: a full
pipe answers EAGAIN, which means that the bell has been rung already.
"""

from __future__ import annotations

import contextlib
import os

__all__ = ["another_rope", "new_bell", "quiet", "ring"]


def new_bell() -> tuple[int, int]:
    """(listening end, ringing end), both nonblocking and close-on-exec."""
    return os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)


def another_rope(ringing: int) -> int:
    """A further ringing end with a description of its own, for somebody who is not trusted."""
    return os.open(f"/proc/self/fd/{ringing}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def ring(ringing: int) -> None:
    """Rings. Nobody listening any more is as good as being heard."""
    with contextlib.suppress(BlockingIOError, BrokenPipeError):
        os.write(ringing, b"\1")


def quiet(listening: int) -> None:
    """Takes all rings so far."""
    with contextlib.suppress(BlockingIOError):
        os.read(listening, 65536)
