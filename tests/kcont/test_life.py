"""The continuation worker as a part of a dataplane: there when it is ready, replaced when it dies, gone in the end."""

from __future__ import annotations

import os
import signal

from tests.workers.rig import Running, wait_for


def test_it_is_replaced() -> None:
    with Running() as dp:
        first = dp.stats()["continuation"]
        assert first["restarts"] == 0
        os.kill(first["pid"], signal.SIGKILL)
        wait_for(lambda: dp.stats()["continuation"]["restarts"] == 1, "the replacement")
        wait_for(lambda: dp.stats()["continuation"]["steps"] > first["steps"], "its first step")
        assert "the continuation worker died: killed by SIGKILL; restarting" in dp.errors
        assert [worker["restarts"] for worker in dp.stats()["workers"]] == [0]
        assert dp.interrupt() == 0
    assert dp.ledger["balanced"]
