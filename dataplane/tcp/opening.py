"""A connection's beginning: the control block of a new one, and what two SYNs agree on.

`conn_open_active` is called by user (REQ_OPEN), `conn_establish` by whoever completed a handshake outside of a
control block (the SYN cache), `take_syn` by syn_sent.
"""

from __future__ import annotations

from dataplane.jit import inlined, shared
from dataplane.shm import layout_tcp as T
from dataplane.shm.atomics import fill, ld64, st64
from dataplane.tcp.congestion import congestion_init
from dataplane.tcp.rtt import rtt_init
from dataplane.tcp.transition import become, event
from dataplane.tcp.window import receive_shift, window_first

__all__ = ["conn_establish", "conn_open_active", "default_mss", "established", "mss_update", "take_syn"]

TIMESTAMP_BYTES = 12
MSS_MIN = 48        # a peer that announces less is taken to mean this
MSS_MAX = 65495     # what an IP packet can carry


@inlined
def default_mss(ip_bytes):
    """What a peer can take that says nothing (RFC 9293 section 3.7.1)."""
    return 536 if ip_bytes == 20 else 1220


@shared
def mss_update(mem, x):
    """T_MSS from what the peer takes, what the path takes, and the options in each segment (RFC 9293 section
    3.7.1, RFC 6691). SACK blocks never go with data, so there is no room to be kept for them."""
    t = x + T.X_TCB
    path = ld64(mem, t + T.T_MTU) - ld64(mem, t + T.T_IP_BYTES) - 20
    options = TIMESTAMP_BYTES if ld64(mem, t + T.T_FLAGS) & T.TF_TIMESTAMPS else 0
    most = min(ld64(mem, t + T.T_PEER_MSS), path) - options
    st64(mem, t + T.T_MSS, min(max(most, MSS_MIN), T.OUT_BYTES_MAX))


@inlined
def _begin(mem, x):
    """What is the same for both ways in: round trips, congestion, time of the last sign of life."""
    mss_update(mem, x)
    rtt_init(mem, x)
    congestion_init(mem, x)
    st64(mem, x + T.X_TCB + T.T_LAST_HEARD, ld64(mem, x + T.X_NOW))


@shared
def conn_open_active(mem, x, mtu, ip_bytes, initial):
    """Active OPEN (RFC 9293 section 3.10.1): an empty control block in SYN_SENT, whose SYN output sends.

    `initial`: 64 bits that nobody can foresee. The lower half becomes the initial sequence number, the upper what is
    added to the clock in timestamps. Whoever makes them cares for RFC 6528 (section 3): a keyed hash of addresses and
    ports, plus a clock.
    """
    t = x + T.X_TCB
    fill(mem, t, 0, T.TCB_BYTES)
    st64(mem, t + T.T_FLAGS, T.TF_ACTIVE)
    st64(mem, t + T.T_ISS, initial & 0xFFFFFFFF)
    st64(mem, t + T.T_TS_OFFSET, (initial >> 32) & 0xFFFFFFFF)
    st64(mem, t + T.T_MTU, mtu)
    st64(mem, t + T.T_IP_BYTES, ip_bytes)
    st64(mem, t + T.T_PEER_MSS, default_mss(ip_bytes))
    st64(mem, t + T.T_RCV_SHIFT, receive_shift(ld64(mem, x + T.X_RCV_MASK) + 1))
    _begin(mem, x)
    become(mem, x, T.SYN_SENT)


@shared
def conn_establish(mem, x):
    """ESTABLISHED, for a connection whose handshake is over.

    The caller has zeroed the control block and put into it: T_ISS, T_IRS, T_TS_OFFSET, T_TS_RECENT, T_TS_RECENT_AT,
    T_FLAGS (TF_SACK, TF_TIMESTAMPS, TF_SCALE as negotiated), T_SND_SHIFT, T_RCV_SHIFT (0 without TF_SCALE),
    T_PEER_MSS (`default_mss` if the SYN had none), T_MTU, T_IP_BYTES, and T_SND_WND in bytes, from the ACK that ended
    the handshake. A segment with data that did so is to be given to tcp_arrive besides. X_NOW, X_RCV_MASK and
    X_LANE_BYTES are set.
    """
    t = x + T.X_TCB
    for word in (T.T_SND_UNA, T.T_SND_NXT, T.T_SND_MAX, T.T_SND_WL2, T.T_RCV_NXT, T.T_LAST_ACK_SENT, T.T_SND_WL1):
        st64(mem, t + word, 1)
    st64(mem, t + T.T_RCV_RIGHT, 1 + window_first(mem, x))
    st64(mem, t + T.T_MAX_WND, ld64(mem, t + T.T_SND_WND))
    _begin(mem, x)
    become(mem, x, T.ESTABLISHED)
    event(mem, x, T.EV_WRITABLE)


@shared
def take_syn(mem, x, s):
    """The peer's SYN, for an OPEN of ours: numbers and options. What it does not offer is not used."""
    t = x + T.X_TCB
    options = ld64(mem, s + T.S_OPTIONS)
    flags = ld64(mem, t + T.T_FLAGS)
    st64(mem, t + T.T_IRS, ld64(mem, s + T.S_SEQ))
    st64(mem, t + T.T_RCV_NXT, 1)
    st64(mem, t + T.T_RCV_RIGHT, 1 + window_first(mem, x))
    if options & T.SO_MSS:
        st64(mem, t + T.T_PEER_MSS, min(max(ld64(mem, s + T.S_MSS), MSS_MIN), MSS_MAX))
    if options & T.SO_SHIFT:
        st64(mem, t + T.T_SND_SHIFT, min(ld64(mem, s + T.S_SHIFT), 14))
        flags |= T.TF_SCALE
    else:
        # RFC 7323 section 2.2: both sides, or neither.
        st64(mem, t + T.T_RCV_SHIFT, 0)
    if options & T.SO_SACK_OK:
        flags |= T.TF_SACK
    if options & T.SO_TIMESTAMPS:
        flags |= T.TF_TIMESTAMPS
        st64(mem, t + T.T_TS_RECENT, ld64(mem, s + T.S_TSVAL))
        st64(mem, t + T.T_TS_RECENT_AT, ld64(mem, x + T.X_NOW))
    st64(mem, t + T.T_FLAGS, flags)
    # Not scaled, in a SYN (RFC 7323 section 2.2).
    st64(mem, t + T.T_SND_WND, ld64(mem, s + T.S_WINDOW))
    st64(mem, t + T.T_MAX_WND, ld64(mem, s + T.S_WINDOW))
    st64(mem, t + T.T_SND_WL1, 0)
    mss_update(mem, x)


@shared
def established(mem, x):
    """ESTABLISHED, by the ACK of our SYN: the congestion window is made of the segment size now agreed on."""
    congestion_init(mem, x)
    st64(mem, x + T.X_TCB + T.T_TIMEOUTS, 0)
    become(mem, x, T.ESTABLISHED)
    event(mem, x, T.EV_WRITABLE)
