"""What consumers send: from their transmit lanes to the protocols' output.

Called by the step. A transmit lane is a lane in the other direction: the consumer produces, this
worker consumes. Its memory is hostile: the head and every record are read once into a local
and checked, and what cannot be costs the consumer its queue, nothing else.
"""

from __future__ import annotations

from dataplane.inet.output import tx_flush, udp_output
from dataplane.inet.tcp_transmit import tcp_transmit
from dataplane.jit import inlined, kernel, shared
from dataplane.rings.lane import record_bytes
from dataplane.shm import layout as L
from dataplane.shm.atomics import ld64, load_acquire, load_relaxed, shr, st64, store_release

assert L.TX_GENERATION == L.TX_PCB + 4 and L.TX_PCB % 8 == 0    # one load gives both

__all__ = ["KCONT", "add_consumer", "remove_consumer", "transmit"]

KCONT = 0
"""The continuation worker's number as a consumer: it sends for every connection."""

SWEEP = 64
"""Records, padding among them, taken from one consumer before the next one's turn."""


@shared
def _send(mem, w, body, length, consumer):
    """One record: 0, or not if it cannot be sent. Its socket must be open, and this consumer's, or a connection
    if it comes from the continuation worker."""
    if length < L.TX_PAYLOAD:
        return -1
    table = ld64(mem, w + L.W_TABLE)
    word = load_relaxed(mem, body + L.TX_PCB)       # and TX_GENERATION
    number = word & 0xFFFFFFFF
    if number >= ld64(mem, table + L.T_SOCKETS):
        return -1
    pcb = ld64(mem, table + L.T_PCBS) + number * L.PCB_BYTES
    if ld64(mem, pcb + L.PCB_STATE) != L.PCB_OPEN or ld64(mem, pcb + L.PCB_GENERATION) != shr(word, 32):
        return -1
    connection = ld64(mem, pcb + L.PCB_KIND) == L.PK_CONNECTION
    if ld64(mem, pcb + L.PCB_OWNER) != consumer and not (connection and consumer == KCONT):
        return -1
    if connection:
        return tcp_transmit(mem, w, body, length, pcb)
    return udp_output(mem, w, body, length, pcb)


@shared
def _drain(mem, w, home, private, consumer):
    """Takes up to SWEEP records of one consumer; returns how many."""
    lane = home + L.HOME_TX
    size = ld64(mem, ld64(mem, w + L.W_TABLE) + L.T_TX_RING)
    tail = ld64(mem, private)
    # SYNC tx-head: acquire pairs with the publish in the client's sendto; else a record could
    # be read before it was written.
    head = load_acquire(mem, lane + L.LANE_HEAD)
    if head == tail:
        return 0
    if head < tail or head - tail > size:
        return 0        # a head that cannot be: the lane is dead until its owner mends it
    taken = 0
    for _ in range(SWEEP):
        if tail >= head:
            break
        at = tail & (size - 1)
        word = load_relaxed(mem, lane + L.LANE_DATA + at)
        length = word & 0xFFFFFF
        need = record_bytes(length)
        if need > head - tail or at + need > size:
            tail = head     # not a record: drop all that is queued
            st64(mem, w + L.W_TX_REFUSED, ld64(mem, w + L.W_TX_REFUSED) + 1)
            break
        if not word & (L.RECORD_PAD << 24):
            if _send(mem, w, lane + L.LANE_DATA + at + L.RECORD_DATA, length, consumer) != 0:
                st64(mem, w + L.W_TX_REFUSED, ld64(mem, w + L.W_TX_REFUSED) + 1)
            taken += 1
        tail += need
    st64(mem, private, tail)
    st64(mem, lane + L.LANE_CONSUMED, ld64(mem, lane + L.LANE_CONSUMED) + taken)
    # SYNC tx-tail: release pairs with sendto's acquire of the tail; else the consumer could
    # overwrite a record that we still read.
    store_release(mem, lane + L.LANE_TAIL, tail)
    return taken


@shared
def _finish(mem, w, home, private, consumer):
    """Takes all that the consumer has queued. No more than fits: it may still be writing."""
    size = ld64(mem, ld64(mem, w + L.W_TABLE) + L.T_TX_RING)
    for _ in range(size // (L.RECORD_ALIGN * SWEEP) + 1):
        if _drain(mem, w, home, private, consumer) == 0:
            break
    tx_flush(mem, w)


@inlined
def transmit(mem, w):
    """One sweep over the transmit lanes of this worker's consumers; returns the records taken."""
    total = 0
    for index in range(ld64(mem, w + L.W_CONSUMER_COUNT)):
        total += _drain(mem, w, ld64(mem, ld64(mem, w + L.W_CONSUMERS) + 8 * index),
                        ld64(mem, w + L.W_TX_LANES) + 16 * index,
                        ld64(mem, ld64(mem, w + L.W_CONSUMER_IDS) + 8 * index))
    return total


@kernel("i64(mem, i64, i64, i64)")
def add_consumer(mem, w, home, consumer):
    """From now on this worker transmits for `consumer`, whose home segment is at `home`: 1, or 0
    when there are too many. A replacement takes the lane over where the dead worker released it."""
    index = ld64(mem, w + L.W_CONSUMER_COUNT)
    if index == L.CONSUMERS_MAX:
        return 0
    st64(mem, ld64(mem, w + L.W_CONSUMERS) + 8 * index, home)
    st64(mem, ld64(mem, w + L.W_CONSUMER_IDS) + 8 * index, consumer)
    # The tail stands in the consumer's memory: aligned here, and otherwise checked against the head.
    tail = load_relaxed(mem, home + L.HOME_TX + L.LANE_TAIL) & -L.RECORD_ALIGN
    st64(mem, ld64(mem, w + L.W_TX_LANES) + 16 * index, tail)
    st64(mem, w + L.W_CONSUMER_COUNT, index + 1)
    return 1


@kernel("i64(mem, i64, i64)")
def remove_consumer(mem, w, home):
    """Sends what the consumer with this home segment has queued, and no longer transmits for it: 1, or
    0 if it did not."""
    last = ld64(mem, w + L.W_CONSUMER_COUNT) - 1
    consumers = ld64(mem, w + L.W_CONSUMERS)
    for index in range(last + 1):
        if ld64(mem, consumers + 8 * index) == home:
            identities = ld64(mem, w + L.W_CONSUMER_IDS)
            private = ld64(mem, w + L.W_TX_LANES)
            _finish(mem, w, home, private + 16 * index, ld64(mem, identities + 8 * index))
            st64(mem, consumers + 8 * index, ld64(mem, consumers + 8 * last))
            st64(mem, identities + 8 * index, ld64(mem, identities + 8 * last))
            st64(mem, private + 16 * index, ld64(mem, private + 16 * last))
            st64(mem, w + L.W_CONSUMER_COUNT, last)
            return 1
    return 0
