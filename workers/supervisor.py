"""The supervisor: makes a dataplane, watches over it, and leaves nothing behind.

`Supervisor(config).run()` is the whole life of `dataplane run`. It is not on the data path: stopped with
SIGSTOP, packets still flow. One thread and one loop (`control/loop.py`); what it makes it registers for
undoing at the same place, so that every way out, also an error half way through the start, ends clean.

It writes the table's header, PCBs and buckets (through `Table`), netif settings, and of the ledger the two
reasons that no worker can count: what the kernel dropped, and what a dead worker had in its hands.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from dataplane import ledger
from dataplane.config import Config
from dataplane.control import messages
from dataplane.control.loop import Loop
from dataplane.control.paths import runtime_directory, socket_path
from dataplane.control.server import Server
from dataplane.errors import DataplaneError
from dataplane.inet.transmit import KCONT
from dataplane.inet.worker import prepare
from dataplane.pcb.table import Table
from dataplane.shm import epoch
from dataplane.shm import layout as L
from dataplane.shm.arena import Arena
from dataplane.shm.bell import ring
from dataplane.shm.segment import Segment, segment_name
from workers import continuation, leavings, process, rx
from workers.crew import Crew, Worker
from workers.kernels import warm_up
from workers.owners import Memory
from workers.service import ControlService, Running, time_wait_ns

TICK = 0.1              # seconds between two looks at counters and ends
STOP_SECONDS = 2.0      # a worker that has not left by then is killed


class Supervisor:
    """One dataplane. `say` prints what a person wants to know while it runs, one line each."""

    def __init__(self, config: Config, say: Callable[[str], None]) -> None:
        self._config, self._say = config, say
        self._uid, self._pid = os.geteuid(), os.getpid()
        self._loop = Loop()
        self._exits = contextlib.ExitStack()
        self._netifs: list[Any] = []
        self._queues: list[ledger.Queue] = []
        self._failed: set[int] = set()          # places of failed netif queues that were told of
        self._interrupts = 0
        self._running = self._stopping = False
        self._started = time.monotonic()    # of the clock that nobody sets
        self.final: dict[str, Any] = {}

    # -- the whole life --------------------------------------------------------------------------------------

    def run(self, duration: float | None = None, ready: Callable[[], None] = lambda: None) -> int:
        """Start, call `ready`, serve until told to stop or until there is nothing left to do, and take all
        down again. Returns the exit code: 1 if a netif failed. `final` is then the ledger.

        Raises DataplaneError and OSError when it could not start, or could not go on.
        """
        with self._exits:
            self._catch_signals()
            self._start()
            if duration is not None:
                self._loop.later(duration, self._loop.stop)
            self._loop.spawn(self._serve(ready))
            self._running = True
            if not self._interrupts:
                self._loop.run()
            self._stop()
        return 1 if self._failed else 0

    def _start(self) -> None:
        config, exits = self._config, self._exits
        _allow_descriptors()
        exits.enter_context(leavings.held(config.name, self._uid))
        self._arena = Arena()
        self._table = self._make_table()
        self._crew = Crew(self._loop, config.cores, self._work, self._died, self._mail)
        exits.callback(self._crew.close)
        infos = [self._open_netif(index) for index in range(len(config.netif))]
        for worker in self._crew.workers:
            prepare(self._arena, self._table, worker.index, config.inet.icmp_rate,
                    config.sockets.tx_ring_bytes)
        self._kcont_home = self._arena.map_anonymous(continuation.home_bytes(config.sockets.tx_ring_bytes), shared=True)
        self._table.put(self._table.offset + L.T_KCONT_ROPE, self._crew.continuation.rope)
        memory = Memory(self._arena, self._crew, lambda what: segment_name(self._uid, config.name, what),
                        config.sockets.tx_ring_bytes)
        running = Running(config, self._uid, self._pid, self._loop, self._table, self._crew, memory, infos)
        self._service = ControlService(running, self.ledger)
        exits.callback(self._unlink_owners)
        self._server = Server(self._loop, socket_path(runtime_directory(), config.name), self._service)
        exits.callback(self._server.close)
        exits.callback(self._tell_consumers)
        exits.callback(self._crew.kill)
        self._crew.start()
        self._loop.later(TICK, self._tick, TICK)

    async def _serve(self, ready: Callable[[], None]) -> None:
        await self._loop.until(lambda: all(worker.ready for worker in self._crew.everyone))
        ready()

    def _stop(self) -> None:
        """Let the workers finish, and count."""
        self._stopping = True
        self._table.put(self._table.offset + L.T_STOP, 1)
        left = self._crew.stop()
        for worker in self._crew.everyone:
            worker.ring()
        self._loop.spawn(self._wait_for(left))
        self._loop.run()
        self._crew.kill()
        for worker in self._crew.workers:
            self._write_off(worker)
        self._poll_netifs()
        self._report_failures()
        self.final = self.ledger()

    def _tell_consumers(self) -> None:
        """Everything that they will ever get is in their rings now."""
        for owner in self._service.owners.values():
            self._table.put(owner.home.offset + L.HOME_STOPPED, 1)
        self._wake_all()

    async def _wait_for(self, left: Callable[[], bool]) -> None:
        await self._loop.until(lambda: left() or self._interrupts > 1, STOP_SECONDS)
        self._loop.stop()

    # -- making ----------------------------------------------------------------------------------------------

    def _make_table(self) -> Table:
        config = self._config
        workers, netifs = len(config.cores), len(config.netif)
        if netifs > L.NIF_MAX:
            raise DataplaneError(f"{netifs} netifs are too many: at most {L.NIF_MAX}")
        capacities = (config.sockets.max, workers, netifs, config.sockets.groups, config.inet.neighbours,
                      config.tcp.time_wait_max)
        size = Table.size(*capacities)
        segment = Segment.create(segment_name(self._uid, config.name, "table"), size, L.SEG_TABLE)
        self._exits.callback(segment.close)
        self._exits.callback(segment.unlink)
        leavings.claim(segment.fd)
        offset = self._arena.map_fd(segment.fd, size)
        self._warm()            # the table's queues are made by kernels
        table = Table(self._arena.mem, offset, *capacities)
        table.put(offset + L.T_TIME_WAIT_NS, time_wait_ns(config))
        for worker in range(workers):
            table.put(table.worker(worker) + L.W_RST_RATE, config.tcp.rst_rate)
        return table

    def _warm(self) -> None:
        """Compile or load all kernels: workers inherit them. Says so when it takes long."""
        kinds = {str(one.__struct_config__.tag) for one in self._config.netif}
        warm_up(kinds, lambda: self._say("compiling kernels, once for this version"))

    def _open_netif(self, index: int) -> messages.NetifInfo:
        settings = self._config.netif[index]
        kind = str(settings.__struct_config__.tag)
        places = [self._table.nif(index, worker.index) for worker in self._crew.workers]
        module = importlib.import_module(f"dataplane.netif.{kind}")
        netif = module.Netif(settings, self._arena, len(places), places)
        self._exits.callback(netif.close)
        self._netifs.append(netif)
        self._queues += [ledger.Queue(place, netif.name, kind, worker) for worker, place in enumerate(places)]
        return messages.NetifInfo(name=netif.name, kind=kind, mtu=netif.mtu, passive=netif.passive,
                                  addresses=list(netif.addresses), gateway=list(netif.gateway))

    def _unlink_owners(self) -> None:
        """Consumers keep what they have mapped; the names go."""
        for owner in [*self._service.owners.values(), *self._service.retiring]:
            for mapping in owner.mappings:
                mapping.segment.unlink()
                mapping.segment.close()

    # -- workers ---------------------------------------------------------------------------------------------

    def _work(self, worker: Worker, channel: socket.socket) -> None:
        """What a forked child does instead of going on here."""
        def close_others() -> None:
            self._loop.forget()
            self._server.close_descriptors()
            self._crew.close_descriptors(worker)

        stamp = 2 + worker.index + worker.restarts * len(self._crew.everyone)       # 1: the supervisor
        if worker is self._crew.continuation:
            continuation.work(continuation.ContinuationPost(
                arena=self._arena, table=self._table, config=self._config, stamp=stamp, supervisor=self._pid,
                channel=channel, doorbell=worker.doorbell, obeyed=worker.ordered, home=self._kcont_home,
                rope=self._crew.workers[0].rope, events=self._service.events(),
                gone=[owner.consumer for owner in self._service.retiring]), close_others)
            return
        consumers = self._service.consumers_of(worker.index)
        if worker.index == 0:       # it transmits for the continuation worker
            consumers.append((KCONT, self._kcont_home))
        rx.work(rx.Post(
            arena=self._arena, table=self._table, config=self._config, index=worker.index, core=worker.core,
            stamp=stamp, supervisor=self._pid, channel=channel, doorbell=worker.doorbell,
            obeyed=worker.ordered, consumers=consumers, events=self._service.events()), close_others)

    def _mail(self, worker: Worker) -> None:
        process.post_mail(self._arena.mem, self._table.worker(worker.index))

    def _died(self, worker: Worker, reason: str) -> None:
        """A worker is dead: what it had in its hands is lost and counted, whom it may have been about to
        wake is woken, and nobody waits for its epoch."""
        block = self._table.worker(worker.index)
        epoch.mark_offline(self._arena.mem, block)
        lost = self._write_off(worker)
        continuation.mourn(self._table, self._table.get(block + L.W_STAMP))
        self._crew.continuation.ring()
        self._wake_all()
        frames = "" if worker is self._crew.continuation else f" {lost} frames lost;"
        self._say(f"{worker.name} died: {reason};{frames} restarting")

    def _write_off(self, worker: Worker) -> int:
        return sum(ledger.write_off(self._arena.mem, queue.place)
                   for queue in self._queues if queue.worker == worker.index)

    def _wake_all(self) -> None:
        mem = self._arena.mem
        rx.ring_homes(mem, [owner.home.offset for owner in self._service.owners.values()])
        rx.ring_sockets(mem, self._table.offset)
        for _, descriptor, _ in self._service.events():
            ring(descriptor)

    # -- watching --------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        self._poll_netifs()
        self._report_failures()
        if self._stopping:
            return
        self._look_at_cores()
        if all(worker.ended for worker in self._crew.workers) and self._nothing_left():
            self._loop.stop()

    def _poll_netifs(self) -> None:
        for netif in self._netifs:
            netif.poll_counters()

    def _look_at_cores(self) -> None:
        """The kernel moves a worker whose core is taken offline; it goes back when the core is there again."""
        for worker in self._crew.workers:
            if worker.pid and worker.ready and (pinned := _pin(worker.pid, worker.core)) == worker.astray:
                worker.astray = not pinned
                self._say(f"{worker.name}: its core is back" if pinned else
                          f"{worker.name}: its core is offline; it runs on others until that is back")

    def _nothing_left(self) -> bool:
        return not self._service.owners or ledger.unread(self._arena.mem, self._table.offset) == 0

    def _report_failures(self) -> None:
        for index, netif in enumerate(self._netifs):
            for worker in self._crew.workers:
                place = self._table.nif(index, worker.index)
                if place in self._failed or self._table.get(place + L.N_STATUS) != L.NS_FAILED:
                    continue
                sentence = netif.error(worker.index) or f"netif {netif.name} failed"
                if not any(self._table.get(other + L.N_INDEX) == index for other in self._failed):
                    self._say(f"dataplane: {sentence}")     # once for all of its queues
                self._failed.add(place)

    def ledger(self) -> dict[str, Any]:
        """The ledger as JSON, with what it is about."""
        told = ledger.snapshot(self._arena.mem, self._table.offset, self._queues, self._closed())
        workers = [self._worker_state(worker) for worker in self._crew.workers]
        beside = self._worker_state(self._crew.continuation)
        about = {"name": self._config.name, "pid": self._pid, "time": time.time(),
                 "uptime": time.monotonic() - self._started}
        return about | told | {"sockets": len(self._table.open_pcbs()),
                               "consumers": len(self._service.owners), "workers": workers,
                               "continuation": {name: beside[name] for name in ("pid", "restarts", "slept", "steps")}}

    def _closed(self) -> Counter[str]:
        return self._service.closed

    def _worker_state(self, worker: Worker) -> dict[str, Any]:
        block = self._table.worker(worker.index)
        words = {"slept": L.W_SLEPT, "steps": L.W_STEPS, "tx_refused": L.W_TX_REFUSED}
        return {"worker": worker.index, "core": worker.core, "pid": worker.pid, "restarts": worker.restarts,
                **{name: self._table.get(block + word) for name, word in words.items()}}

    # -- signals ---------------------------------------------------------------------------------------------

    def _catch_signals(self) -> None:
        self._exits.enter_context(_wakeup(self._loop, self._woken))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._exits.callback(signal.signal, number, signal.signal(number, self._interrupted))
        self._exits.callback(signal.signal, signal.SIGCHLD, signal.signal(signal.SIGCHLD, lambda *_: None))

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += 1
        if not self._running:           # still starting: nothing is served yet, undo what was done
            raise KeyboardInterrupt
        if not self._stopping:
            self._loop.stop()

    def _woken(self) -> None:
        self._crew.reap()


def _pin(pid: int, core: int) -> bool:
    """Whether the process is on this core alone, or will be from now on."""
    try:
        if os.sched_getaffinity(pid) != {core}:
            os.sched_setaffinity(pid, {core})
    except ProcessLookupError:      # it has just died
        return True
    except OSError:
        return False
    return True


def _allow_descriptors() -> None:
    """One per consumer and one per event loop: as many as we may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextlib.contextmanager
def _wakeup(loop: Loop, callback: Callable[[], None]) -> Iterator[None]:
    """Let signals wake the loop; their handlers have run when `callback` is called."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)

        def drain() -> None:
            with contextlib.suppress(BlockingIOError):
                while ours.recv(4096):
                    pass
            callback()

        former = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        loop.watch(ours.fileno(), drain)
        try:
            yield
        finally:
            loop.watch(ours.fileno())
            signal.set_wakeup_fd(former)
