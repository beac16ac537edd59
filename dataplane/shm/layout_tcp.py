"""Where every word of TCP lives: the connection's slot, its control block, and the protocol's workbench.

Numbers only, as layout.py, whose rules hold here. Words are int64.

A connection is a *slot* in a segment of its owner: everything in it can be written by a hostile
consumer at any time. So nobody computes on it. Whoever holds the slot's lock copies the control
block into its own *exchange block*, clamps it (tcp/service.py), runs the protocol there, and copies
the result back into the other of the two copies in the slot; one store of CONN_CURRENT makes it
count. A holder that dies leaves the connection as it was before.

Positions in a stream are 64-bit and start at 0 with the SYN, so that the first byte of data is at
1; the wire's 32-bit sequence number is (initial + position) mod 2^32. Nothing in here ever wraps.
Times are CLOCK_MONOTONIC ns; 0: never.
"""

from __future__ import annotations

# -- connection slot -------------------------------------------------------------------------------
# The wake object comes first. Then, each on lines of its own: lock; the application's words; what
# the protocol tells the application; two control blocks; lanes; send ring; receive ring.
CONN_WAKE = 0
CONN_LOCK = 64          # owner-stamped lock (shm/lock.py)
CONN_PENDING = 72       # 1: somebody came who did not get the lock; its holder looks again
CONN_CURRENT = 80       # which of the two control blocks counts: 0 or 1
CONN_READ = 128         # application: position up to which it has read
CONN_WRITTEN = 136      # application: position up to which it has put bytes into the send ring
CONN_REQUEST = 144      # application: REQ_...
CONN_OPTIONS = 152      # application: OPT_...
CONN_KEEP_IDLE = 160    # application: ns of silence before the first keepalive probe
CONN_KEEP_INTERVAL = 168
CONN_KEEP_COUNT = 176
CONN_USER_TIMEOUT = 184  # application: ns that sent data may stay unacknowledged; 0: RTX_MAX retransmissions
CONN_CALLED = 192       # application: CLOCK_MONOTONIC ns at which it last ran the protocol, or waited
CONN_RECEIVED = 256     # protocol: position up to which the receive ring has bytes in order (released)
CONN_ACKED = 264        # protocol: position before which the send ring is free again (released)
CONN_STATUS = 272       # protocol: state:8 | ST_...:8 | errno:16
CONN_RIGHT = 280        # protocol: right edge of the window as advertised
CONN_DEADLINE = 288     # protocol: when it wants to run at the latest; 0: never (a hint)
CONN_BLOCKS = 512       # two control blocks
TCB_BYTES = 1280
CONN_LANES = 3072       # lane of worker i at CONN_LANES + i * (LANE_DATA + lane bytes); then the rings

REQ_OPEN = 1            # connect: send a SYN (CONN_WRITTEN etc. are set)
REQ_SHUTDOWN = 2        # no more bytes will be written: FIN behind the last one
REQ_CLOSED = 4          # the application is gone: nobody reads any more (implies REQ_SHUTDOWN)
REQ_ABORT = 8           # RST, now (implies REQ_CLOSED)

OPT_NODELAY = 1
OPT_KEEPALIVE = 2
OPT_CORK = 4
OPT_QUICKACK = 8        # acknowledge every segment at once
OPT_NEWRENO = 16        # congestion control: NewReno in place of CUBIC

ST_EOF = 1 << 8         # CONN_STATUS: the peer's FIN is behind CONN_RECEIVED
ST_SHUT = 1 << 9        # nothing more can be written
ST_ERRNO = 16           # shift of the errno that ended the connection; 0: none

# -- states (RFC 9293 section 3.3.2) -------------------------------------------------------------------
CLOSED, LISTEN, SYN_SENT, SYN_RECEIVED, ESTABLISHED, FIN_WAIT_1, FIN_WAIT_2, CLOSE_WAIT, CLOSING, LAST_ACK, \
    TIME_WAIT = range(11)

# -- control block (TCB), in the exchange block and, at rest, in the slot --------------------------------
# Connection and window: tcp/ input, output, timers
T_STATE = 0
T_ERROR = 8             # errno that ended it: ECONNRESET, ETIMEDOUT, ECONNREFUSED, EHOSTUNREACH; 0
T_FLAGS = 16            # TF_...
T_ISS = 24              # wire: initial send sequence number
T_IRS = 32              # wire: the peer's
T_SND_UNA = 40
T_SND_NXT = 48
T_SND_MAX = 56          # highest position ever sent
T_SND_WND = 64          # bytes
T_SND_WL1 = 72
T_SND_WL2 = 80
T_MAX_WND = 88          # largest window the peer has offered
T_SND_SHIFT = 96        # of the windows that the peer tells
T_RCV_NXT = 104
T_RCV_RIGHT = 112       # right edge of the window that we advertised; never shrinks
T_RCV_SHIFT = 120       # of the windows that we tell
T_MSS = 128             # bytes of data in a full segment that we send (options already taken off)
T_PEER_MSS = 136        # what the peer's MSS option said (536 or 1220 without one)
T_MTU = 144             # path MTU: IP packet bytes
T_IP_BYTES = 152        # 20 or 40: bytes of the IP header
T_RCV_MSS = 160         # largest segment received so far (for delayed ACK and window updates)
T_TS_RECENT = 168       # wire, RFC 7323
T_TS_RECENT_AT = 176    # ns when it was taken
T_TS_OFFSET = 184       # what is added to the clock's milliseconds in TSval
T_LAST_ACK_SENT = 192   # position
T_RTX_AT = 200          # timers
T_DELACK_AT = 208
T_PERSIST_AT = 216
T_KEEP_AT = 224
T_END_AT = 232          # end of FIN_WAIT_2 (application gone), or of TIME_WAIT
T_UNACKED_SEGMENTS = 240  # segments received since our last ACK
T_KEEP_PROBES = 248     # unanswered keepalive probes
T_PERSIST_SHIFT = 256
T_LAST_HEARD = 264      # ns of the last segment from the peer
T_FIN_AT = 272          # position of our FIN, 0: none yet
T_PEER_FIN_AT = 280     # position of the peer's FIN, 0: none yet
T_CHALLENGE_AT = 288    # RFC 5961 section 7: rate limit of challenge ACKs: start of the second,
T_CHALLENGES = 296      # and how many in it
T_SEGMENTS_IN = 304     # statistics
T_SEGMENTS_OUT = 312
T_RETRANSMITS = 320
T_DUPLICATES_IN = 328
T_STALL_AT = 336        # ns since when something sent waits for an acknowledgement without progress (user timeout)
T_SOFT_ERROR = 344      # errno that the network reported (RFC 1122 section 4.2.3.9): told if the connection times out
T_SMALL_AT = 352        # end of the last segment sent that was not full (Nagle in Minshall's form)
T_TIMEOUTS = 360        # retransmission timeouts since the last progress (T_BACKOFF outlives progress, by Karn)
T_CORE_FREE = 368       # ... up to 448: for the connection's own words

# Round trips, congestion, recovery: tcp/ rtt, congestion, recovery
T_SRTT = 448            # ns; 0: no sample yet
T_RTTVAR = 456
T_RTO = 464
T_BACKOFF = 472         # consecutive timeouts
T_TIMED_POSITION = 480  # Karn: position being timed (no timestamps), 0: none
T_TIMED_AT = 488
T_MIN_RTT = 496
T_CWND = 504            # bytes
T_SSTHRESH = 512
T_CWND_ACKED = 520      # bytes acknowledged towards the next increase
T_RECOVER = 528         # recovery ends when this position is acknowledged
T_PHASE = 536           # PHASE_...
T_DUPACKS = 544
T_HIGH_RXT = 552        # RFC 6675: highest position retransmitted in this recovery
T_PROBE_AT = 560        # tail-loss probe, RFC 8985 section 7
T_PROBE_END = 568
T_RECOVERY_FREE = 576   # from here on, CUBIC, PRR, undo, reordering; 760 is free
T_CUBIC_AT = 576        # RFC 9438: start of the congestion avoidance stage; 0: none
T_CUBIC_MAX = 584       # bytes: W_max; 0: none
T_CUBIC_K = 592         # ns: K
T_CUBIC_EST = 600       # 1/1024 bytes: W_est
T_CUBIC_PRIOR = 608     # bytes: cwnd_prior
T_CWND_PRIOR = 616      # as they were before the last reduction, to undo it; 0: nothing to undo
T_SSTHRESH_PRIOR = 624
T_CUBIC_MAX_PRIOR = 632
T_UNDO_BYTES = 640      # retransmitted since that reduction and not reported as a duplicate (D-SACK)
T_RXT_STAMP = 648       # Eifel: TSval of the first retransmission | 1 << 32; 0: none, or already judged
T_PRR_DELIVERED = 656   # RFC 6937, bytes
T_PRR_OUT = 664
T_PRR_FLIGHT = 672      # RecoverFS
T_LOST = 680            # what is not SACKed before this position is lost
T_REORDER_WND = 688     # ns: reordering window; 0: no reordering seen, DupThresh decides
T_REORDER_HIGH = 696    # up to here SACKed ...
T_REORDER_AT = 704      # ... since this time; 0: nothing SACKed
T_HOLE_AT = 712         # T_REORDER_AT when the present recovery began
T_SENT_AT = 720         # ns of the last segment with data
T_LIMITED_TO = 728      # data before it was sent with the congestion window in full use
T_PROBE_STATE = 736     # PROBE_...
T_DSACKED = 744         # bytes that the segment being processed reports as duplicates
T_RESCUE = 752          # RFC 6675: RescueRxt

PHASE_OPEN, PHASE_RECOVERY, PHASE_LOSS = 0, 1, 2
PROBE_NONE, PROBE_NEW, PROBE_AGAIN = 0, 1, 2    # a probe is out: with new data, with the last segment again

# What the peer has SACKed above SND_UNA (tcp/scoreboard): ascending, disjoint
T_SB_COUNT = 768
T_SB = 776              # [SB_MAX] of (from, to)
SB_MAX = 14
# What has come out of order, behind RCV_NXT (tcp/reassembly): ascending, disjoint
T_RA_COUNT = 1008
T_RA_LATEST = 1016      # `from` of the range that the last segment went to: told first in SACK (RFC 2018 section 4)
T_RA = 1024             # [RA_MAX] of (from, to)
RA_MAX = 14

TF_SACK = 1             # negotiated
TF_TIMESTAMPS = 2
TF_SCALE = 4
TF_ACK_NOW = 8          # an ACK is due in this run
TF_FIN_SENT = 16        # our FIN has been sent at least once
TF_RST_SENT = 32
TF_ORPHAN = 64          # the application is gone
TF_ACTIVE = 128         # opened by us
TF_PUSH = 256           # set PSH on the last segment of what is written so far
TF_REFUSE = 512         # send a RST for the last segment (position and ACK in the words below)
TF_PROBE = 1024         # a zero-window probe is due in this run, or what the small window has room for
TF_KEEP = 2048          # a keepalive probe is due in this run
T_RST_SEQ = 1248        # wire: sequence number of a RST to be sent, and its acknowledgement; -1: without ACK
T_RST_ACK = 1256
T_DSACK_FROM = 1264     # what came twice and the next ACK tells (RFC 2883), 0, 0: nothing
T_DSACK_TO = 1272

# -- a received segment, parsed (tcp/segment.py) ----------------------------------------------------------
S_SEQ = 0               # wire
S_ACK = 8               # wire
S_FLAGS = 16            # FIN | SYN | RST | PSH | ACK | URG | ECE | CWR
S_WINDOW = 24           # wire, not yet scaled
S_DATA = 32             # place of the data
S_LENGTH = 40           # bytes of data
S_OPTIONS = 48          # SO_...
S_MSS = 56
S_SHIFT = 64
S_TSVAL = 72
S_TSECR = 80
S_SACK_COUNT = 88
S_SACKS = 96            # [4] of (left, right), wire
S_TIME = 160            # when the worker got it: CLOCK_REALTIME ns (statistics only)
S_BYTES = 192

SO_MSS, SO_SHIFT, SO_SACK_OK, SO_TIMESTAMPS, SO_SACK = 1, 2, 4, 8, 16
FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = 1, 2, 4, 8, 16, 32, 64, 128

# -- a segment to be sent (tcp/output.py fills it, tcp/segment.py and inet/tcp_transmit.py read it) ----------
# Ports and addresses are not in it: they come from the PCB. Through a consumer's transmit lane it is hostile.
O_SEQ = 0               # wire
O_ACK = 8               # wire
O_FLAGS = 16            # 0: no segment at all, only O_DEADLINE for the continuation worker
O_WINDOW = 24           # wire, scaled
O_FROM = 32             # place of the first byte of data in the send ring: position & (ring bytes - 1)
O_LENGTH = 40           # bytes of data, up to OUT_BYTES_MAX: cut into O_SEGMENT bytes each
O_SEGMENT = 48          # bytes of data of one segment on the wire
O_OPTIONS = 56          # SO_...
O_MSS = 64
O_SHIFT = 72
O_TSVAL = 80
O_TSECR = 88
O_SACK_COUNT = 96
O_SACKS = 104           # [4] of (left, right), wire
O_DEADLINE = 168        # CONN_DEADLINE as of this run
O_BYTES = 192
OUT_MAX = 64            # segments of one run
OUT_BYTES_MAX = 61440   # data of one of them: with all headers it fits in an IP packet

# -- exchange block: private to whoever runs the protocol ----------------------------------------------------
X_NOW = 0
X_CONN = 8              # place of the slot
X_LANE_BYTES = 16       # ring bytes of each lane; trusted
X_WORKERS = 24          # lanes
X_SND = 32              # place of the send ring, its bytes - 1
X_SND_MASK = 40
X_RCV = 48              # place of the receive ring, its bytes - 1
X_RCV_MASK = 56
X_READ = 64             # the application's words, read once and clamped
X_WRITTEN = 72
X_REQUEST = 80
X_OPTIONS = 88
X_KEEP_IDLE = 96
X_KEEP_INTERVAL = 104
X_KEEP_COUNT = 112
X_USER_TIMEOUT = 120
X_STAMP = 128           # what is written into the lock
X_OUT_COUNT = 136
X_OUT_MAX = 144         # how many segments may be put out in this run
X_EVENTS = 152          # EV_...: what this run changed for the application
X_DEADLINE = 160        # when to run again; 0: no need
X_TIME_WAIT = 168       # ns of TIME_WAIT (2 MSL)
X_AGAIN = 176           # the lock's holder was asked to look again
X_RANDOM = 184          # 64 random bits, new for each run where they matter (opening)
X_DIRECT = 192          # consumer, in a call that receives: place of its buffer,
X_DIRECT_LEFT = 200     # and room there: data in order go there, not into the receive ring, if that is empty
X_SEGMENT = 256         # the segment being processed: S_BYTES
X_TCB = 512             # the control block: TCB_BYTES
X_TAILS = 1792          # [WORKERS_MAX] of (where the lane was read up to, records taken)
WORKERS_MAX = 128
X_OUT = 3840            # [OUT_MAX] of O_BYTES
X_BYTES = X_OUT + OUT_MAX * O_BYTES

EV_READABLE = 1         # bytes, end or error where there were none
EV_WRITABLE = 2         # at least a third of the send ring is free
EV_STATE = 4            # opened, ended, failed
EV_MORE = 8             # X_OUT is full: run again

# -- records of a connection's lanes: a TCP header with data as it was on the wire (addresses and checksum
# verified), or, flagged RECORD_CONTROL, what the network said about the connection
RECORD_CONTROL = 16     # record flags (layout.RECORD_...)
CTL_KIND = 0            # CTL_MTU | CTL_UNREACHABLE
CTL_VALUE = 8           # next-hop MTU | errno
CTL_SEQ = 16            # wire: sequence number of the segment that the message is about
CTL_BYTES = 24
CTL_MTU, CTL_UNREACHABLE, CTL_REFUSED = 1, 2, 3

# -- record of a listener's lane: a connection to be accepted --------------------------------------------------
A_PCB = 0               # u32 number | u32 generation
A_SEGMENT = 8           # number of the segment with its slot
A_SLOT = 16             # offset in it
A_FAMILY = 24           # family:16 | remote port:16 | local port:16
A_REMOTE_HI = 32
A_REMOTE_LO = 40
A_LOCAL_HI = 48
A_LOCAL_LO = 56
A_BYTES = 64

assert CONN_BLOCKS + 2 * TCB_BYTES <= CONN_LANES and CONN_LANES % 128 == 0
assert T_CORE_FREE < T_SRTT and T_RECOVERY_FREE < T_SB_COUNT and T_SB + 16 * SB_MAX <= T_RA_COUNT
assert T_RA + 16 * RA_MAX <= T_RST_SEQ and T_DSACK_TO + 8 <= TCB_BYTES
assert X_SEGMENT + S_BYTES <= X_TCB and X_TCB + TCB_BYTES <= X_TAILS and X_TAILS + 16 * WORKERS_MAX <= X_OUT
assert O_DEADLINE + 8 <= O_BYTES and S_TIME + 8 <= S_BYTES
