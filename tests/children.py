"""Forked processes for tests: what the parent has mapped and compiled is there, and none outlives its test."""

from __future__ import annotations

import faulthandler
import os
import resource
import select
import signal
import traceback
from collections.abc import Callable
from types import TracebackType

WATCHDOG = 100.0
"""Seconds after which a child that should have ended is hanging. Below pytest's own timeout."""


class Child:
    """Runs `action` in a forked process. As a context manager it is killed and reaped at the end."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _run(action)
        self._fd = os.pidfd_open(self.pid)

    def join(self, timeout: float = WATCHDOG) -> int:
        """Waits; exit status: 0, 1 after an exception (which was printed), or minus the signal."""
        if self.status is None:
            ended, _, _ = select.select([self._fd], [], [], timeout)
            if not ended:
                os.kill(self.pid, signal.SIGKILL)
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self._fd)
            assert ended, f"process {self.pid} hung"
        return self.status

    def kill(self) -> int:
        """SIGKILL; reaped when this returns."""
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
        return self.join()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.kill()


def _run(action: Callable[[], object]) -> None:
    status = 1
    try:
        faulthandler.disable()      # a child may be meant to fault
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        action()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
