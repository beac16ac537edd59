"""Netif `pcap`: replays a capture file.

The file is mapped, and frames are handed out where they stand in it. Each queue walks the whole
file by itself and takes the frames that fall to it by their flow hash, so that queues share
nothing but the time of the start. Private memory of a queue: the reader of `_pcapfile`, then the
words below. Its worker writes them; they are shared memory, and a replacement of the worker
goes on at the last frame that was done.

Pace: `recorded` and a rate count from the first call of `rx` of any queue and are about all
frames of the file, also those of other queues. `fast` is backpressure: a frame that finds a
full ring comes again.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from dataplane.config import Context, FilePath, NetifSettings
from dataplane.errors import DataplaneError
from dataplane.jit import callback, inlined
from dataplane.netif import _pace
from dataplane.netif import _pcapfile as capture
from dataplane.shm import layout as L
from dataplane.shm.arena import Arena
from dataplane.shm.atomics import as_memory, ld64, load_acquire, st64, store_release
from dataplane.wire.flow import flow_queue

KIND = "pcap"


class Settings(NetifSettings, tag=KIND, frozen=True, kw_only=True):
    """Replays a capture file, classic pcap or pcapng. Passive: nothing is ever transmitted."""

    path: Annotated[FilePath, Meta(description="The capture.")]
    pace: Annotated[
        Literal["recorded", "fast"] | Annotated[float, Meta(ge=_pace.RATE_MIN, le=_pace.RATE_MAX)],
        Meta(
            description="When frames are due: with the gaps of the recording (`recorded`), at so many "
            "packets per second (a number), or as fast as consumers take them, without loss (`fast`).",
            extra={"expected": '"recorded", "fast" or a number of packets per second above 0'},
        ),
    ] = "recorded"
    loop: Annotated[
        int, Meta(ge=0, description="How often the file is played; 0: for ever.", extra={"unit": "times"})
    ] = 1
    start: Annotated[
        int,
        Meta(
            ge=0,
            description="The first frame comes once so many sockets are open; 0: at once.",
            extra={"unit": "sockets"},
        ),
    ] = 0

    def check(self, where: str, ctx: Context) -> None:
        try:
            fd, _, _ = _open(self.path)
            os.close(fd)
        except DataplaneError as error:
            problem = str(error).removeprefix(f"{self.path}: ")
            ctx.error("path", self.path, "a pcap or pcapng file", problem)


# -- private memory of a queue, behind the reader ----------------------------------------------------------

X_PACE = capture.READER_BYTES       # FAST | RECORDED | RATE
X_RATE = X_PACE + 8         # frames in each
X_UNIT = X_PACE + 16        # so many ns
X_LOOP = X_PACE + 24        # rounds to play; 0: for ever
X_ROUND = X_PACE + 32       # rounds that are over,
X_BASE = X_PACE + 40        # the packets in them,
X_ROUND_START = X_PACE + 48  # and how long they took, ns (recorded)
X_FIRST = X_PACE + 56       # recorded time of the first packet, and the latest of all
X_LATEST = X_PACE + 64
X_PICKED = X_PACE + 72      # 1: this queue has had a frame
X_LEADER = X_PACE + 80      # place of queue 0's X_START
X_START = X_PACE + 88       # SYNC pace-start: written by cas, by any queue
X_DUE = X_PACE + 96         # this burst: frames that are due (RATE), or ns since the start (RECORDED)
X_BEGUN = X_PACE + 104      # this burst: what X_START is
X_SCRATCH = X_PACE + 112    # 16 bytes
C_WHICH = X_PACE + 128      # which of the two following holds:
C_COMMITTED = X_PACE + 136  # the cursor behind the last frame that was done, and X_ROUND ... X_ROUND_START
C_MARKS = 512               # the cursor behind each frame of the last burst
CURSOR_BYTES = 24
COMMITTED_BYTES = CURSOR_BYTES + 24

FAST, RECORDED, RATE = 0, 1, 2
INTERFACES_BYTES = capture.INTERFACES_MAX * capture.I_BYTES     # a queue's table of interfaces
_RECORDS = 1024     # looked at in one call, so that a step stays short

assert C_COMMITTED + 2 * COMMITTED_BYTES <= C_MARKS
assert C_MARKS + L.BURST * CURSOR_BYTES <= L.N_BYTES - L.N_PRIVATE


@inlined
def _copy3(mem, target, source):
    for i in range(0, 24, 8):
        st64(mem, target + i, ld64(mem, source + i))


@inlined
def _mark(mem, s, frames):
    """The cursor stands behind this many frames of the burst."""
    _copy3(mem, s + C_MARKS + (frames - 1) * CURSOR_BYTES, s + capture.F_POSITION)


@inlined
def _commit(mem, s):
    """What is before the cursor is done with. A worker may die between any two stores: it is the
    last one that counts."""
    which = 1 - ld64(mem, s + C_WHICH)
    target = s + C_COMMITTED + which * COMMITTED_BYTES
    _copy3(mem, target, s + capture.F_POSITION)
    _copy3(mem, target + CURSOR_BYTES, s + X_ROUND)
    # SYNC pcap-cursor: release, pairs with the load in _rewind of this worker's replacement; else the
    # replacement could go on from a cursor that is half the former one.
    store_release(mem, s + C_WHICH, which)


@inlined
def _rewind(mem, s):
    """Back to the first frame that is not done with."""
    # SYNC pcap-cursor: acquire, pairs with the store in _commit, else as there.
    source = s + C_COMMITTED + load_acquire(mem, s + C_WHICH) * COMMITTED_BYTES
    _copy3(mem, s + capture.F_POSITION, source)
    _copy3(mem, s + X_ROUND, source + CURSOR_BYTES)


@inlined
def _tick(mem, s):
    """What is due in this burst."""
    pace = ld64(mem, s + X_PACE)
    if pace == FAST:
        return
    begun, now = _pace.started(mem, ld64(mem, s + X_LEADER), s + X_SCRATCH)
    st64(mem, s + X_BEGUN, begun)
    st64(mem, s + X_DUE, now - begun)
    if pace == RATE:
        st64(mem, s + X_DUE, _pace.allowed(now - begun, ld64(mem, s + X_RATE), ld64(mem, s + X_UNIT)))


@inlined
def _wait(mem, s):
    """When the packet just read is due, CLOCK_MONOTONIC in ns; 0: now. One without a time is
    due with the one before it."""
    pace, time = ld64(mem, s + X_PACE), ld64(mem, s + capture.R_TIME)
    if pace == RATE:
        index = ld64(mem, s + X_BASE) + ld64(mem, s + capture.F_PACKET)
        if index >= ld64(mem, s + X_DUE):
            return ld64(mem, s + X_BEGUN) + _pace.due(index, ld64(mem, s + X_RATE), ld64(mem, s + X_UNIT))
    elif pace == RECORDED and time != capture.NO_TIME:
        after = time - ld64(mem, s + X_FIRST) + ld64(mem, s + X_ROUND_START)
        if after > ld64(mem, s + X_DUE):
            return ld64(mem, s + X_BEGUN) + after
    return 0


@inlined
def _note_time(mem, s):
    """First and latest time of the file. Reading a packet again changes nothing."""
    time = ld64(mem, s + capture.R_TIME)
    if time == capture.NO_TIME:
        return
    if ld64(mem, s + X_FIRST) == capture.NO_TIME:
        st64(mem, s + X_FIRST, time)
        st64(mem, s + X_LATEST, time)
    st64(mem, s + X_LATEST, max(time, ld64(mem, s + X_LATEST)))


@inlined
def _is_mine(mem, nif, s):
    queues = ld64(mem, nif + L.N_QUEUES)
    if queues <= 1:
        return True
    frame, length, link = ld64(mem, s + capture.R_FRAME), ld64(mem, s + capture.R_LENGTH), ld64(mem, s + capture.R_LINK)
    return flow_queue(mem, link, frame, length, queues) == ld64(mem, nif + L.N_QUEUE)


@inlined
def _describe(mem, s, p):
    st64(mem, p + L.P_FRAME, ld64(mem, s + capture.R_FRAME))
    st64(mem, p + L.P_LENGTH, ld64(mem, s + capture.R_LENGTH))
    st64(mem, p + L.P_WIRE, ld64(mem, s + capture.R_WIRE))
    st64(mem, p + L.P_TIME, max(0, ld64(mem, s + capture.R_TIME)))
    st64(mem, p + L.P_LINK, ld64(mem, s + capture.R_LINK))
    st64(mem, p + L.P_FLAGS, 0)


@inlined
def _next_round(mem, s):
    """The file is over: whether it is played again.

    A queue to which nothing fell in a whole round has come to its end, since the next round
    would be the same. Recorded pace goes on after a mean gap between packets, or after a second
    if the file does not tell any.
    """
    rounds = ld64(mem, s + X_ROUND) + 1
    if ld64(mem, s + X_PICKED) == 0 or rounds == ld64(mem, s + X_LOOP):
        return False
    packets, span = ld64(mem, s + capture.F_PACKET), ld64(mem, s + X_LATEST) - ld64(mem, s + X_FIRST)
    gap = span // (packets - 1) if packets > 1 else 0
    st64(mem, s + X_ROUND_START, ld64(mem, s + X_ROUND_START) + span + (gap if gap > 0 else _pace.SECOND))
    st64(mem, s + X_BASE, ld64(mem, s + X_BASE) + packets)
    st64(mem, s + X_ROUND, rounds)
    capture.restart(mem, s)
    _commit(mem, s)
    return True


@inlined
def _nothing(mem, nif, s, state):
    """What `rx` returns when no frame was found. Unless a time to come for one is known, there may be one
    at once: the next record, or the next round."""
    if state < 0:
        st64(mem, nif + L.N_ERROR, -state)
        st64(mem, nif + L.N_ERROR_AT, ld64(mem, s + capture.F_PACKET) + 1)
        return L.NIF_FAILED
    _commit(mem, s)
    if state == capture.END and not _next_round(mem, s):
        return L.NIF_ENDED
    if ld64(mem, nif + L.N_NEXT) == 0:
        st64(mem, nif + L.N_NEXT, 1)
    return 0


@inlined
def _take(mem, nif, s, p):
    """Describes the packet just read at `p`, if it is this queue's: 1; 0: another queue's; -1: it is not due
    yet, and the cursor stays before it."""
    _note_time(mem, s)
    if not _is_mine(mem, nif, s):
        capture.advance(mem, s)
        return 0
    wait = _wait(mem, s)
    if wait > 0:
        st64(mem, nif + L.N_NEXT, wait)
        return -1
    _describe(mem, s, p)
    capture.advance(mem, s)
    return 1


@inlined
def _receive(mem, nif, burst, most):
    s = nif + L.N_PRIVATE
    st64(mem, nif + L.N_NEXT, 0)
    _rewind(mem, s)
    _tick(mem, s)
    frames, state = 0, capture.SKIPPED
    for _ in range(_RECORDS):
        if capture.section_ahead(mem, s):
            if frames > 0:
                break
            _commit(mem, s)
        state = capture.next_record(mem, s)
        if state == capture.PACKET:
            taken = _take(mem, nif, s, burst + frames * L.P_BYTES)
            if taken < 0:
                break
            frames += taken
            if taken:
                _mark(mem, s, frames)
                if frames == most:
                    break
        elif state != capture.SKIPPED:
            break
    if frames == 0:
        return _nothing(mem, nif, s, state)
    st64(mem, s + X_PICKED, 1)
    _mark(mem, s, frames)       # with what followed and was not ours
    return frames


@callback(3)
def rx(base, nif, burst, limit):
    """Up to `limit` frames: how many, 0, NIF_ENDED or NIF_FAILED."""
    mem = as_memory(base)
    return _receive(mem, nif, burst, max(1, min(limit, L.BURST)))


@callback(2)
def done(base, nif, frames):
    """The first `frames` of the last burst are finished with; the others will come again."""
    mem = as_memory(base)
    s = nif + L.N_PRIVATE
    if 0 < frames <= L.BURST:
        _copy3(mem, s + capture.F_POSITION, s + C_MARKS + (frames - 1) * CURSOR_BYTES)
        _commit(mem, s)
    return 0


# -- the supervisor's side ---------------------------------------------------------------------------------


def _open(path: str) -> tuple[int, int, capture.Header]:
    """Descriptor, size and beginning of a capture; DataplaneError names the file."""
    try:
        # A named pipe would block: it is refused below.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise DataplaneError(f"{path}: {error.strerror}") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a file")
        return fd, status.st_size, capture.inspect(os.pread(fd, capture.HEADER_BYTES, 0))
    except (OSError, ValueError) as error:
        os.close(fd)
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataplaneError(f"{path}: {reason}") from None


class Netif:
    """A capture that is being replayed; `nifs[i]` is the netif queue of worker i in `arena`."""

    mtu = 65535
    passive = True

    def __init__(self, settings: Settings, arena: Arena, queues: int, nifs: list[int]) -> None:
        self.name = Path(settings.path).name
        self.addresses: list[str] = []
        self.gateway: list[str] = []
        self._path = settings.path
        self._arena = arena
        self._nifs = nifs
        self._mappings: list[tuple[int, int]] = []
        fd, size, header = _open(settings.path)
        tables = len(nifs) * INTERFACES_BYTES
        try:
            file = self._keep(arena.map_fd(fd, size, writable=False), size)
            table = self._keep(arena.map_anonymous(tables, shared=True), tables)
        except OSError as error:
            self.close()
            raise DataplaneError(f"{settings.path}: {error.strerror}") from None
        finally:
            os.close(fd)
        for queue, nif in enumerate(nifs):
            self._fill(nif, settings)
            for word, value in (
                (capture.F_FILE, file),
                (capture.F_SIZE, size),
                (capture.F_TABLE, table + queue * INTERFACES_BYTES),
                (capture.F_KIND, header.kind),
                (capture.F_SWAP, header.swap),
                (capture.F_UNIT, header.unit),
                (capture.F_LINK, header.link),
                (capture.F_BEGIN, header.begin),
                (C_COMMITTED, header.begin),
            ):
                self._word(nif + L.N_PRIVATE + word, value)

    def _keep(self, offset: int, size: int) -> int:
        self._mappings.append((offset, size))
        return offset

    def _word(self, offset: int, value: int | None = None) -> int:
        """The word at `offset` of the arena; sets it first, if a value is given."""
        word = self._arena.mem[offset:offset + 8].view("<i8")
        if value is not None:
            word[0] = value
        return int(word[0])

    def _fill(self, nif: int, settings: Settings) -> None:
        """What does not depend on the file."""
        rate, unit = 0, 0
        pace = {"fast": FAST, "recorded": RECORDED}.get(str(settings.pace), RATE)
        if isinstance(settings.pace, float | int):
            rate, unit = _pace.ratio(settings.pace)
        flags = L.NF_PASSIVE | (L.NF_BACKPRESSURE if pace == FAST else 0)
        for word, value in (
            (L.N_RX, rx.address), (L.N_DONE, done.address), (L.N_TX, 0), (L.N_LINK, L.LINK_RAW),
            (L.N_FLAGS, flags), (L.N_FD, -1), (L.N_FDS_SYN, -1), (L.N_FDS_SYN + 8, -1),
            (L.N_MTU, self.mtu), (L.N_START, settings.start),
        ):
            self._word(nif + word, value)
        for word, value in (
            (X_PACE, pace), (X_RATE, rate), (X_UNIT, unit), (X_LOOP, settings.loop), (X_FIRST, capture.NO_TIME),
            (X_LATEST, capture.NO_TIME), (X_LEADER, self._nifs[0] + L.N_PRIVATE + X_START),
        ):
            self._word(nif + L.N_PRIVATE + word, value)

    def poll_counters(self) -> None:
        """Nothing is lost outside of the workers."""

    def error(self, queue: int) -> str | None:
        """Why the queue is NS_FAILED, as one sentence."""
        nif = self._nifs[queue]
        damage, packet = self._word(nif + L.N_ERROR), self._word(nif + L.N_ERROR_AT)
        if damage not in capture.DAMAGES:
            return None
        at, said, has = (self._word(nif + L.N_PRIVATE + word) for word in (capture.E_AT, capture.E_SAID, capture.E_HAS))
        problem = capture.DAMAGES[damage].format(said=said, has=has, link=capture.link_name(said))
        return f"{self._path}: packet {packet} at offset {at}: {problem}"

    def close(self) -> None:
        """Takes the file out of the arena. No worker may still use it."""
        while self._mappings:
            self._arena.unmap(*self._mappings.pop())
