"""A dataplane's life as a process: start, end, and everything that can be killed on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dataplane.control.messages import Bind, Bound, Close, Done
from dataplane.errors import DataplaneError
from tests.workers.rig import ROOT, SYNTHETIC, Running, bind, wait_for

pytestmark = pytest.mark.timeout(300)       # the first start of a session may have to compile
CAPTURES = Path(__file__).parents[1] / "captures"
TWO_CORES = pytest.mark.skipif(len(psutil.Process().cpu_affinity() or ()) < 2, reason="needs two cores")


def identity(ledger: dict) -> None:
    """The ledger's identity, in all and per queue, and that of the sockets."""
    for row in [ledger, *ledger["queues"]]:
        assert row["offered"] == row["delivered"] + sum(row["dropped"].values()) + row["held"], row
        assert row["balanced"]
    assert ledger["deliveries"] == ledger["consumed"] + ledger["unread"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it(number: int) -> None:
    with Running() as dp:
        wait_for(lambda: dp.stats()["offered"] > 1000, "packets")
        assert dp.interrupt(number) == 0
        assert dp.remains() == []
        assert dp.ledger["offered"] > 1000 and dp.ledger["dropped"] == {"no_socket": dp.ledger["offered"]}
        identity(dp.ledger)
        assert "no_socket" in dp.errors         # the table for people


def test_duration_ends_it() -> None:
    with Running(arguments=("--duration", "0.2")) as dp:
        assert dp.wait() == 0 and dp.remains() == []
        identity(dp.ledger)


@TWO_CORES
def test_workers_are_pinned_and_share_the_work() -> None:
    with Running(cores="[0, 1]") as dp:
        wait_for(lambda: all(queue["offered"] > 100 for queue in dp.stats()["queues"]), "packets in both queues")
        assert [psutil.Process(pid).cpu_affinity() for pid in dp.workers()] == [[0], [1]]
        assert dp.interrupt() == 0
        assert {queue["worker"] for queue in dp.ledger["queues"]} == {0, 1}
        identity(dp.ledger)


@pytest.mark.parametrize("idle", ["busy", "adaptive", "poll"])
def test_idle_strategies_deliver(idle: str) -> None:
    with Running(idle=idle, start=1) as dp:
        connection, _ = dp.attach()
        with connection:
            bind(connection, kind="udp", address="0.0.0.0", port=5000)
            wait_for(lambda: dp.stats()["delivered"] > 0, "a packet")
        assert dp.interrupt() == 0
        assert (dp.ledger["workers"][0]["slept"] == 0) == (idle == "busy")
        identity(dp.ledger)


def test_a_second_start_is_refused() -> None:
    with Running() as dp, Running(name=dp.name) as second:
        assert not second.ready
        assert second.wait() == 2
        assert f"dataplane {dp.name!r} is running already (pid {dp.process.pid})" in second.errors
        assert dp.stats()["name"] == dp.name    # still there
        with pytest.raises(subprocess.CalledProcessError) as refused:
            subprocess.run([sys.executable, "-m", "dataplane", "clean", dp.name], cwd=ROOT, check=True,
                           capture_output=True, text=True)
        assert refused.value.returncode == 2 and "is running" in refused.value.stderr
        assert dp.interrupt() == 0


def test_another_runtime_directory_is_no_way_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Running() as dp:
        with monkeypatch.context() as other:
            other.setenv("DATAPLANE_RUNTIME_DIR", str(tmp_path))
            with Running(name=dp.name) as second:
                assert second.wait() == 2 and "is running already" in second.errors
        assert len(dp.remains()) == 3
        assert dp.interrupt() == 0


def test_it_ends_by_itself_when_all_is_taken() -> None:
    with Running(count=1000, start=1) as dp:
        connection, _ = dp.attach()
        with connection:
            # Four ports, one socket: a quarter of 1000 packets is delivered, and nobody takes it.
            bind(connection, kind="udp", address="0.0.0.0", port=5000)
            wait_for(lambda: dp.stats()["offered"] == 1000, "all packets")
            assert dp.stats()["queues"][0]["status"] == "ended"
            assert dp.process.poll() is None
            unread = dp.stats()["unread"]
            assert unread == dp.stats()["delivered"] > 0
        assert dp.wait() == 0       # no consumer is left
        identity(dp.ledger)
        assert dp.ledger["unread"] == unread


def test_a_failed_netif_is_told_of() -> None:
    path = CAPTURES / "damaged.pcapng"
    with Running(f'[[netif]]\nkind = "pcap"\npath = "{path}"\npace = "fast"\n') as dp:
        assert dp.wait() == 1
        assert [line for line in dp.errors.splitlines() if line.startswith("dataplane:") and str(path) in line]
        assert dp.ledger["queues"][0]["status"] == "failed"
        identity(dp.ledger)


# -- deaths ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("idle", ["busy", "poll"])
def test_a_dead_worker_is_replaced(idle: str) -> None:
    with Running(idle=idle) as dp:
        connection, _ = dp.attach()
        with connection:
            bound = bind(connection, kind="udp", address="0.0.0.0", port=5000, ring_bytes=1 << 20)
            wait_for(lambda: dp.sockets()[0].published > 100, "packets")
            [old] = dp.workers()
            os.kill(old, signal.SIGKILL)
            wait_for(lambda: dp.workers() not in ([old], [0]), "another worker")
            published = dp.sockets()[0].published
            wait_for(lambda: dp.sockets()[0].published > published + 100, "packets in the same socket")
            assert dp.sockets()[0].pcb == bound.pcb
            bind(connection, kind="udp", address="0.0.0.0", port=5001)      # its orders arrive
        assert dp.interrupt() == 0
        assert "died: killed by SIGKILL" in dp.errors
        assert dp.ledger["workers"][0]["restarts"] == 1
        identity(dp.ledger)


def test_a_worker_killed_by_sigterm_is_replaced() -> None:
    with Running() as dp:
        [old] = dp.workers()
        os.kill(old, signal.SIGTERM)
        wait_for(lambda: dp.workers() not in ([old], [0]), "another worker")
        assert dp.interrupt() == 0
        identity(dp.ledger)


def test_workers_that_keep_dying_end_it() -> None:
    with Running() as dp:
        killed: set[int] = set()

        def kill_all() -> bool:
            try:
                found = dp.workers()
            except (DataplaneError, OSError):
                return True
            for pid in set(found) - killed - {0}:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            return dp.process.poll() is not None

        wait_for(kill_all, "the end")
        assert dp.wait() == 1
        assert "RX workers keep dying: 6 deaths" in dp.errors
        assert dp.remains() == []


def test_workers_follow_a_dead_supervisor() -> None:
    with Running() as dp:
        connection, attached = dp.attach()
        bound = bind(connection, kind="udp", address="0.0.0.0", port=5000)
        workers = [psutil.Process(pid) for pid in dp.workers()]
        home = Path("/dev/shm") / (attached.home.name or "").lstrip("/")
        dp.process.kill()
        wait_for(lambda: not any(worker.is_running() for worker in workers), "the workers' end", 5)
        assert home.read_bytes()[64] == 1       # HOME_STOPPED: the consumer knows, too
        assert connection.ended() and bound
        connection.close()
        assert len(dp.remains()) == 5           # table, home, rings, socket, lock
        with Running(name=dp.name) as next_one:
            assert next_one.ready
            assert len(next_one.remains()) == 3
            assert next_one.interrupt() == 0
        assert dp.remains() == []


def test_a_name_is_taken_while_a_worker_of_it_lives() -> None:
    with Running() as dp:
        [worker] = map(psutil.Process, dp.workers())
        worker.suspend()
        dp.process.kill()
        dp.process.wait()
        with Running(name=dp.name) as second:
            assert second.wait() == 2 and "is running already" in second.errors
            worker.resume()
            wait_for(lambda: not worker.is_running(), "the worker's end", 5)


def test_clean_removes_what_a_killed_one_left() -> None:
    with Running() as dp:
        [worker] = map(psutil.Process, dp.workers())
        dp.process.kill()
        dp.process.wait()
        wait_for(lambda: not worker.is_running(), "the worker's end", 5)
        assert dp.remains()
        done = subprocess.run([sys.executable, "-m", "dataplane", "clean", dp.name], cwd=ROOT, check=True,
                              capture_output=True, text=True)
        assert f"/dataplane.{os.geteuid()}.{dp.name}.table" in done.stdout
        assert dp.remains() == []


def test_packets_flow_while_the_supervisor_is_stopped() -> None:
    with Running(start=1) as dp:
        connection, _ = dp.attach()
        with connection:
            bound = bind(connection, kind="udp", address="0.0.0.0", port=5000, ring_bytes=1 << 20)
            assert bound.segment is not None and bound.segment.name is not None
            ring = Path("/dev/shm") / bound.segment.name.lstrip("/")

            def head() -> int:
                with ring.open("rb") as file:
                    file.seek(bound.slot + 128)         # the first lane's LANE_HEAD
                    return int.from_bytes(file.read(8), "little")

            dp.process.send_signal(signal.SIGSTOP)
            before = head()
            wait_for(lambda: head() > before, "packets without a supervisor")
            dp.process.send_signal(signal.SIGCONT)
        assert dp.interrupt() == 0
        identity(dp.ledger)


def test_a_dead_consumers_sockets_are_closed() -> None:
    code = ("import sys; from tests.workers.rig import *; from dataplane.control.wire import Connection\n"
            "c = Connection.open(sys.argv[1])\n"
            "c.request(messages.Attach(messages.PROTOCOL_VERSION, L.fingerprint()), messages.Attached)\n"
            "bind(c, kind='udp', address='0.0.0.0', port=5000); bind(c, kind='tap')\n"
            "print('bound', flush=True); sys.stdin.read()")
    with Running() as dp:
        consumer = subprocess.Popen([sys.executable, "-c", code, dp.name], cwd=ROOT, stdin=subprocess.PIPE,
                                    stdout=subprocess.PIPE, text=True)
        assert consumer.stdout is not None and consumer.stdout.readline() == "bound\n"
        assert {one.pid for one in dp.sockets()} == {consumer.pid} and len(dp.remains()) == 6
        consumer.kill()
        consumer.communicate()
        wait_for(lambda: dp.sockets() == [], "the sockets' end", 5)
        wait_for(lambda: len(dp.remains()) == 3, "the segments' end", 5)
        connection, _ = dp.attach()
        with connection:
            bind(connection, kind="udp", address="0.0.0.0", port=5000)      # free again
        assert dp.interrupt() == 0
        identity(dp.ledger)


def test_sockets_come_and_go_while_packets_flow() -> None:
    with Running(idle="busy", rate=0) as dp:
        connection, _ = dp.attach()
        with connection:
            for _ in range(200):
                bound = bind(connection, kind="udp", address="0.0.0.0", port=5000, ring_bytes=4096)
                assert bound.pcb < 256
                connection.request(Close(bound.pcb, bound.generation), Done)
        assert dp.interrupt() == 0
        identity(dp.ledger)


# -- starts that fail --------------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.needs("unshare", "mount")
def test_too_little_shared_memory() -> None:
    script = "mount -t tmpfs -o size=256k tmpfs /dev/shm && exec \"$@\""
    with Running(prefix=("unshare", "-m", "sh", "-c", script, "sh")) as dp:
        assert not dp.ready and dp.wait() == 2
        assert "sockets.max: 256: needs" in dp.errors and "262144 bytes are available" in dp.errors
        assert dp.remains() == []


def test_a_netif_that_cannot_be_opened_leaves_nothing() -> None:
    with Running(SYNTHETIC + '\n[[netif]]\nkind = "pcap"\npath = "/nowhere.pcap"\n') as dp:
        assert not dp.ready and dp.wait() == 2
        assert "/nowhere.pcap" in dp.errors and dp.remains() == []


def test_interrupted_at_the_start() -> None:
    with Running(wait=False) as dp:
        wait_for(dp.remains, "the first thing it makes", 60)
        assert dp.interrupt() in (0, 130)
        assert dp.remains() == []


def test_a_refused_request_changes_nothing() -> None:
    with Running() as dp:
        connection, _ = dp.attach()
        with connection:
            bind(connection, kind="udp", address="0.0.0.0", port=5000)
            with pytest.raises(OSError, match="in use"):
                connection.request(Bind("udp", "0.0.0.0", 5000), Bound)
            assert len(dp.sockets()) == 1
        assert dp.interrupt() == 0
