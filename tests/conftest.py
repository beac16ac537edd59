"""What all tests share: the markers that need something of the machine, and the check that nothing is left.

`root` and `needs(*tools)` skip with a reason where the machine does not have it. On a machine that is meant
to have everything (CI=true), such a skip is a failure: otherwise a suite that tests nothing would pass.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import settings

SHM = Path("/dev/shm")
MARK = "DATAPLANE_TEST_SESSION"

# The same examples every time, and no time limit on each: a shared machine may be slow. To explore, run with
# --hypothesis-profile=explore.
settings.register_profile("default", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile("default")


def pytest_sessionstart() -> None:
    # A script that starts us in the background leaves SIGINT ignored, here and in all that we start; some
    # tests are about Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    reasons = []
    if item.get_closest_marker("root") and os.geteuid() != 0:
        reasons.append("needs root")
    tools = [tool for marker in item.iter_markers("needs") for tool in marker.args]
    reasons += [f"needs the program {tool}" for tool in tools if shutil.which(tool) is None]
    if not reasons:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(f"skipped although CI=true: {', '.join(reasons)}", pytrace=False)
    pytest.skip(", ".join(reasons))


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left() -> Iterator[None]:
    """After the last test: no shared memory and no process of this session is left.

    Every process that the session starts inherits a mark in its environment, so that one which has lost its
    parent is still found.
    """
    before = _shared_memory()
    os.environ[MARK] = mark = uuid.uuid4().hex
    yield
    processes = _processes(mark)
    _, processes = psutil.wait_procs(processes, timeout=3)  # those that are just ending are no leak
    segments = _shared_memory() - before
    segments -= _mapped_by_others(segments, mark)
    left = [f"process {one.pid}: {_command(one)}" for one in processes if _alive(one)]
    left += [f"shared memory: {SHM / name}" for name in sorted(segments)]
    for one in processes:
        with contextlib.suppress(psutil.Error):
            one.kill()
    if left:
        pytest.fail("left behind by the tests:\n" + "\n".join(left), pytrace=False)


def _shared_memory() -> set[str]:
    """Return the names of dataplanes' segments and semaphores: root's tests make some of other users, too."""
    mine = "dataplane" if os.geteuid() == 0 else f"dataplane.{os.geteuid()}."
    names = {path.name for path in SHM.iterdir()}
    return {name for name in names if name.removeprefix("sem.").startswith(mine)}


def _processes(mark: str) -> list[psutil.Process]:
    """Return the processes of the session that still run."""
    mine = {one.pid: one for one in psutil.Process().children(recursive=True)}
    for one in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if one.pid != os.getpid() and one.environ().get(MARK) == mark:
                mine.setdefault(one.pid, one)
    return [one for one in mine.values() if _alive(one)]


def _alive(process: psutil.Process) -> bool:
    """Tell whether it is a leak: neither ended nor multiprocessing's own, which ends with the session."""
    try:
        command = " ".join(process.cmdline())
        ended = not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
    return not ended and "multiprocessing.resource_tracker" not in command and "forkserver" not in command


def _mapped_by_others(names: set[str], mark: str) -> set[str]:
    """Return which of `names` a process of somebody else uses: another session on the same machine."""
    ours = {one.pid for one in _processes(mark)} | {os.getpid()}
    theirs: set[str] = set()
    for one in psutil.process_iter() if names else ():
        if one.pid in ours:
            continue
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{one.pid}/maps").read_text()
            theirs |= {name for name in names if f"{SHM / name}\n" in maps}
    return theirs


def _command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return "ended meanwhile"
