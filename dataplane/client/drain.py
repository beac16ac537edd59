"""The consumer's kernels: find records in the lanes, give them back, wait for more.

Called by sockets, pollers and `consume`. For each lane that it reads a consumer has a *row*: 64 bytes of
its private memory (nobody else maps it), so that a look at an empty lane touches the row and the
lane's head, and nothing that the producer reads. A socket's rows are given as a vector of their
places in `mem`; a poller's vector is that of all its sockets.

    tail <= position <= head        [tail, position) is taken but not yet released,
                                    [position, head) is queued

Whoever calls a kernel here holds the turn (`waiting.Turn`) of these rows.
"""

from __future__ import annotations

from dataplane.client.fields import port_at, source_lo
from dataplane.jit import inlined, kernel
from dataplane.rings.lane import lane_next, lane_peek, lane_release, record_bytes
from dataplane.rings.wake import wake_arm, wake_disarm, wake_ring, wake_sleep
from dataplane.shm import layout as L
from dataplane.shm.atomics import ld8, ld64, load_relaxed, pause, prefetch, st64
from dataplane.shm.libc import CLOCK_MONOTONIC, clock_ns

__all__ = [
    "ROW_BYTES", "WAITER_BYTES", "arm_event", "await_packets", "collect", "disarm", "look", "open_row",
    "payload_offset", "peek", "pending", "release_row", "release_rows", "rest", "settle", "take", "wake_up",
]

# -- row: one lane as its consumer sees it ---------------------------------------------------------
ROW_LANE = 0            # the lane's place in the arena
ROW_MASK = 8
ROW_TAIL = 16           # what LANE_TAIL is
ROW_POSITION = 24       # taken up to here
ROW_TAKEN = 32          # packets in [tail, position)
ROW_BYTES = 64

# -- waiter: one per wake object ---------------------------------------------------------------------
WAIT_WAKE = 0           # the wake object's place in the arena
WAIT_SPIN = 8           # ns to look before sleeping
WAIT_CLOCK = 16         # scratch for clock_gettime
WAIT_UNTIL = 32         # scratch for wake_sleep
WAITER_BYTES = 64

# -- records[field, i]: what peek and take write about the i-th packet ---------------------------------------
(REC_OFFSET,            # payload, from the origin
 REC_LENGTH,            # of the payload
 REC_TIME,
 REC_WORD,              # RECORD_WORD as it is: flags and aux
 REC_PACKET,            # the packet itself, from the origin
 REC_ROW,               # the row of its lane
 REC_END,               # position behind it
 REC_REMOTE,            # IPv4: source address << 16 | port; IPv6: ~port; a frame: -1
 REC_FIELDS) = range(9)

_AHEAD = 8              # lanes whose heads are prefetched
_PAD = L.RECORD_PAD << 24
_FRAME = L.RECORD_FRAME << 24


@kernel("none(mem, i64, i64, i64)")
def open_row(mem, row, lane, mask):
    """Begins to read the lane where its last reader stopped."""
    tail = ld64(mem, lane + L.LANE_TAIL)
    st64(mem, row + ROW_LANE, lane)
    st64(mem, row + ROW_MASK, mask)
    st64(mem, row + ROW_TAIL, tail)
    st64(mem, row + ROW_POSITION, tail)
    st64(mem, row + ROW_TAKEN, 0)


@inlined
def payload_offset(word):
    """Where in the packet its payload begins: 0 for frames and for raw sockets."""
    return 0 if word & _FRAME else (word >> 32) & 0xFFFF


# -- release ---------------------------------------------------------------------------------------


@inlined
def release_row(mem, row):
    """Gives back what was taken. A lane of which nothing was taken is not written to."""
    position = ld64(mem, row + ROW_POSITION)
    if position != ld64(mem, row + ROW_TAIL):
        lane_release(mem, ld64(mem, row + ROW_LANE), position, ld64(mem, row + ROW_TAKEN))
        st64(mem, row + ROW_TAIL, position)
        st64(mem, row + ROW_TAKEN, 0)


@kernel("none(mem, vec)")
def release_rows(mem, rows):
    """Gives back all that was taken."""
    for row in rows:
        release_row(mem, row)


@kernel("none(mem, vec, mat, i64)")
def settle(mem, rows, records, used):
    """Gives back the first `used` of the records that `peek` described; the others stay queued."""
    for i in range(used):
        row = records[REC_ROW, i]
        st64(mem, row + ROW_POSITION, records[REC_END, i])
        st64(mem, row + ROW_TAKEN, ld64(mem, row + ROW_TAKEN) + 1)
    for row in rows:
        release_row(mem, row)


# -- take ------------------------------------------------------------------------------------------


@inlined
def _remote(mem, packet, payload, word):
    if word & _FRAME:
        return -1
    port = port_at(mem, packet, payload, 8)
    return source_lo(mem, packet) << 16 | port if ld8(mem, packet) >> 4 == 4 else ~port


@inlined
def _describe(mem, row, records, origin, have, limit):
    """Describes what is queued in one lane; the number of records that there are now."""
    lane, mask = ld64(mem, row + ROW_LANE), ld64(mem, row + ROW_MASK)
    head = lane_peek(mem, lane)
    position = lane_next(mem, lane, mask, ld64(mem, row + ROW_POSITION), head)
    end = min(head, position + limit)
    count = have
    while position < end and count < records.shape[1]:
        record = lane + L.LANE_DATA + (position & mask)
        packet = record + L.RECORD_DATA
        word = ld64(mem, record + L.RECORD_WORD)
        length = word & 0xFFFFFF
        payload = packet + payload_offset(word)
        position += record_bytes(length)
        records[REC_OFFSET, count] = payload - origin
        records[REC_LENGTH, count] = packet + length - payload
        records[REC_TIME, count] = ld64(mem, record + L.RECORD_TIME)
        records[REC_WORD, count] = word
        records[REC_PACKET, count] = packet - origin
        records[REC_ROW, count] = row
        records[REC_END, count] = position
        records[REC_REMOTE, count] = _remote(mem, packet, payload, word)
        count += 1
        position = lane_next(mem, lane, mask, position, head)
    return count


@kernel("i64(mem, vec, mat, i64, i64, i64)")
def peek(mem, rows, records, origin, limit, turn):
    """Describes queued packets, at most as many as `records` has columns, and from each lane those that
    begin less than `limit` bytes behind the first. The first look is at lane `turn`. Returns how many. They
    stay queued until `settle`."""
    count = 0
    for i in range(rows.size):
        if count == records.shape[1]:
            break
        count = _describe(mem, rows[(turn + i) % rows.size], records, origin, count, limit)
    return count


@kernel("i64(mem, vec, mat, i64, i64)")
def take(mem, rows, records, origin, turn):
    """As `peek`, without limit, and takes them: they are the caller's until `release_rows`."""
    count = 0
    for i in range(rows.size):
        have = count
        row = rows[(turn + i) % rows.size]
        count = _describe(mem, row, records, origin, have, ld64(mem, row + ROW_MASK) + 1)
        if count > have:
            st64(mem, row + ROW_POSITION, records[REC_END, count - 1])
            st64(mem, row + ROW_TAKEN, ld64(mem, row + ROW_TAKEN) + count - have)
    return count


# -- wait ------------------------------------------------------------------------------------------


@inlined
def _has_packets(mem, row):
    return lane_peek(mem, ld64(mem, row + ROW_LANE)) != ld64(mem, row + ROW_POSITION)


@inlined
def _look(mem, rows):
    for i in range(rows.size):
        if i + _AHEAD < rows.size:
            prefetch(mem, ld64(mem, rows[i + _AHEAD] + ROW_LANE) + L.LANE_HEAD)
        if _has_packets(mem, rows[i]):
            return True
    return False


@kernel("i64(mem, vec)")
def look(mem, rows):
    """Whether there are packets."""
    return 1 if _look(mem, rows) else 0


@kernel("i64(mem, vec, i64, vec)")
def pending(mem, rows, lanes, ready):
    """Writes the numbers of the sockets (`lanes` rows each) that have packets into `ready`, which has
    room for all. Returns how many."""
    count = 0
    sockets = rows.size // lanes
    for i in range(sockets):
        if i + _AHEAD < sockets:
            prefetch(mem, ld64(mem, rows[(i + _AHEAD) * lanes] + ROW_LANE) + L.LANE_HEAD)
        for lane in range(lanes):
            if _has_packets(mem, rows[i * lanes + lane]):
                ready[count] = i
                count += 1
                break
    return count


@inlined
def _spin(mem, rows, waiter, deadline):
    end = min(clock_ns(mem, waiter + WAIT_CLOCK, CLOCK_MONOTONIC) + ld64(mem, waiter + WAIT_SPIN), deadline)
    while True:
        if _look(mem, rows):
            return True
        # A look takes the line of the head away from its producer: not more often than every µs or so.
        for _ in range(16):
            pause()
        if clock_ns(mem, waiter + WAIT_CLOCK, CLOCK_MONOTONIC) >= end:
            return False


@kernel("none(mem, i64, i64)")
def rest(mem, waiter, duration):
    """Does nothing for so many ns."""
    end = clock_ns(mem, waiter + WAIT_CLOCK, CLOCK_MONOTONIC) + duration
    while clock_ns(mem, waiter + WAIT_CLOCK, CLOCK_MONOTONIC) < end:
        for _ in range(16):
            pause()


@kernel("i64(mem, vec, i64, i64)")
def await_packets(mem, rows, waiter, deadline):
    """Spins, then sleeps until there are packets (1), or until `deadline` (ns of CLOCK_MONOTONIC), a
    signal or a false alarm (0)."""
    if _spin(mem, rows, waiter, deadline):
        return 1
    wake = ld64(mem, waiter + WAIT_WAKE)
    # SYNC wake-state: full barrier before the look, pairs with the notifier's fence; else this
    # could sleep on a full ring.
    wake_arm(mem, wake, L.WAKE_FUTEX)
    found = _look(mem, rows)
    if not found:
        wake_sleep(mem, wake, deadline, waiter + WAIT_UNTIL)
    wake_disarm(mem, wake)
    return 1 if found or _look(mem, rows) else 0


@kernel("i64(mem, vec, i64)")
def arm_event(mem, rows, wake):
    """From now on the bell announces packets. 1 if there are some already: then it is not armed."""
    # SYNC wake-state: as in await_packets.
    wake_arm(mem, wake, L.WAKE_PIPE)
    if not _look(mem, rows):
        return 0
    wake_disarm(mem, wake)
    return 1


@kernel("none(mem, i64)")
def disarm(mem, wake):
    """Takes back what arm_event did."""
    wake_disarm(mem, wake)


@kernel("i64(mem, i64, i64, vec)")
def collect(mem, table, count, fired):
    """An event loop's bell has rung: whose wake objects of the `count` in `table` (0: not armed) has a notifier
    disarmed since arm_event? Takes them out; their numbers are in `fired`. Returns how many."""
    found = 0
    for i in range(count):
        if i + _AHEAD < count:
            prefetch(mem, ld64(mem, table + 8 * (i + _AHEAD)))
        wake = ld64(mem, table + 8 * i)
        if wake != 0 and load_relaxed(mem, wake + L.WAKE_STATE) != L.WAKE_PIPE:
            st64(mem, table + 8 * i, 0)
            fired[found] = i
            found += 1
    return found


@kernel("none(mem, i64)")
def wake_up(mem, wake):
    """Ends the sleep of another thread of this process."""
    wake_ring(mem, wake)
