"""Where every shared word lives. Numbers only: a file with no behaviour but its own hash.

Read by all kernels (which freeze the numbers into machine code) and by the Python around
them. Offsets are bytes. Words are int64 in host order unless a line says otherwise. A word
with more than one writer, or that is read while it is written, names its rule.

Who writes what, in short: the supervisor writes the table's header, PCBs, buckets and
netif settings; an RX worker writes its own worker block, its own lane states and its own
netif queues' state; a consumer writes its own segment. See docs/architecture.md.
"""

from __future__ import annotations

import hashlib

from dataplane.shm import layout_tcp

CACHE_LINE = 64
LAYOUT_VERSION = 1
MAGIC = int.from_bytes(b"dataplan", "little")

# -- every segment: the first 64 bytes --------------------------------------------------------
SEG_MAGIC = 0
SEG_VERSION = 8
SEG_FINGERPRINT = 16    # hash of this file's numbers, `fingerprint()`
SEG_BYTES = 24          # size of the segment
SEG_KIND = 32           # SEG_TABLE | SEG_HOME | SEG_RINGS | SEG_CONNECTIONS
SEG_HEADER = 64
SEG_TABLE, SEG_HOME, SEG_RINGS, SEG_CONNECTIONS = 1, 2, 3, 4

# -- lane: one SPSC packet ring ------------------------------------------------------------
#
#   +0    head | 120 bytes unused      written by the producer only
#   +128  tail | consumed | unused     written by the consumer only
#   +256  data, a power of two of bytes
#
# Two 64-byte lines apart, not one: the adjacent-line prefetcher moves lines in pairs.
LANE_HEAD = 0           # bytes published since the start; only grows
LANE_TAIL = 128         # bytes released since the start; only grows
LANE_CONSUMED = 136     # packets released since the start (statistics)
LANE_DATA = 256
LANE_MIN_BYTES = 4096

# A record: header, packet, padding to RECORD_ALIGN. It never wraps: what does not fit before
# the end of the ring is preceded by a padding record up to the end.
RECORD_WORD = 0         # length:24 | flags:8 | aux:32, from the lowest bit
RECORD_TIME = 8         # nanoseconds since the epoch (CLOCK_REALTIME of the source)
RECORD_DATA = 16
RECORD_ALIGN = 16
RECORD_PAD = 1          # flags: skip; length counts the bytes behind the header
RECORD_VLAN = 2         # flags: aux holds a VLAN tag
RECORD_FRAME = 4        # flags: a tap's frame; aux is the length on the wire
RECORD_REASSEMBLED = 8  # flags: made of fragments
# aux of a packet: offset of what the socket calls payload (raw sockets: 0):16 | VLAN tag control information:16

# -- lane state: what one worker knows of one socket's lane; 64 bytes, in the table -----------
# Indexed [worker][PCB]. Written by that worker; the supervisor fills it before the PCB can
# be found. A worker's replacement goes on from here, never from what a consumer can write.
LS_HEAD = 0             # staged up to here
LS_PUBLISHED = 8        # what LANE_HEAD is, or is about to become
LS_TAIL = 16            # LANE_TAIL as last seen
LS_BASE = 24            # the lane's place in the arena; 0: this PCB has no lane
LS_MASK = 32            # ring bytes - 1
LS_WAKE = 40            # the wake object's place in the arena; 0: a TCP connection's. Written by the supervisor
LS_COUNT = 48           # packets published
LS_DROPPED = 56         # packets dropped because the ring was full
LS_BYTES = 64

# -- wake object: belongs to one waiter; 64 bytes in an owner segment -------------------------
WAKE_STATE = 0          # WAKE_AWAKE | WAKE_FUTEX | WAKE_PIPE; exchanged by both sides. The futex too
WAKE_EVENT = 8          # number of the bell (shm/bell.py) in the workers, 0 if none (a hint: validated)
WAKE_BYTES = 64
WAKE_AWAKE, WAKE_FUTEX, WAKE_PIPE = 0, 1, 2

# -- pcq: multi-producer single-consumer queue of int64 items; rings/pcq.py has its rules ---------
PCQ_HEAD = 0            # positions claimed so far; only grows. Advanced by any producer
PCQ_TAIL = 128          # positions taken so far; only grows. The consumer's
PCQ_TAKEN = 136         # the consumer's own: where Python finds the item that it took
PCQ_CAPACITY = 256
PCQ_SLOTS = 320         # [capacity] of PCQ_SLOT_BYTES
PCQ_WORD = 0            # FREE: position:62 | state:2; else: stamp:30 | position:32 | state:2
PCQ_ITEM = 8
PCQ_SLOT_BYTES = 16
PCQ_FREE, PCQ_RESERVED, PCQ_FULL, PCQ_SKIP = 0, 1, 2, 3
PCQ_MAX_CAPACITY = 1 << 30
STAMP_MAX = (1 << 30) - 1   # stamps of workers are 1 ... this

# -- socket slot in a ring segment: wake object, then one lane per worker -----------------------
SLOT_WAKE = 0
SLOT_LANES = 128        # lane of worker i at SLOT_LANES + i * (LANE_DATA + ring bytes)
SLOT_ALIGN = 128

# -- home segment: one per consumer ------------------------------------------------------------
HOME_STOPPED = 64       # 1: the dataplane has ended. Written by the supervisor
HOME_SLEEPING = 128     # 1: the worker that transmits for us sleeps. Written by it, cleared by us
HOME_WAKE = 192         # wake object of the consumer itself (transmit lane has room)
HOME_POLLERS = 4096     # wake objects for pollers, WAKE_BYTES each
HOME_MAX_POLLERS = 64
HOME_TX = 8192          # transmit lane: LANE_DATA + tx ring bytes

# A transmit record's body (behind the record header, whose aux is 0): 32 bytes, payload. That of a TCP
# connection: a segment to be sent, layout_tcp.O_BYTES; its data stay in the send ring.
TX_PCB = 0              # u32, number of the PCB
TX_GENERATION = 4       # u32, the PCB's generation: a closed socket's number may be used again
TX_FAMILY = 8           # u16, 4 or 6
TX_PORT = 10            # u16
TX_ADDRESS_HI = 16
TX_ADDRESS_LO = 24
TX_PAYLOAD = 32

# -- table segment ---------------------------------------------------------------------------
# Written by the supervisor before the workers start, except where it says otherwise.
T_SECRET0 = 64          # hash keys
T_SECRET1 = 72
T_WORKERS = 80
T_SOCKETS = 88          # capacity: PCBs 0 ... n-1
T_BUCKETS = 96          # number of buckets - 1
T_PCBS = 104            # the regions, as offsets in the arena:
T_BUCKET_AT = 112
T_PORTS = 120           # class bits, u8 [2][65536]: UDP, TCP
T_CHAINS = 128          # first PCB + 1 on the port, u32 [2][65536]
T_GROUPS = 136
T_LANES = 144           # lane states, [worker][PCB]
T_WORKER_AT = 152       # worker blocks
T_NIFS = 160            # netif queues, [netif][worker]
T_NIF_COUNT = 168
T_NEIGHBOURS = 176
T_NEIGHBOUR_MASK = 184
T_GROUP_COUNT = 192
T_TX_RING = 200         # bytes of every transmit ring
T_EPOCH = 256           # own line: the global epoch; grows. Written by the supervisor
T_OPEN = 320            # sockets open now (netifs with `start` wait for it)
T_TAPS = 328            # first tap's PCB + 1, chained through PCB_NEXT
T_RAWS = 336            # first raw socket's PCB + 1
T_ANY = 344             # class bits of the any-port sockets: [UDP, TCP], u8 each
T_ANY_CHAIN = 352       # first any-port UDP PCB + 1
T_TIME_WAIT_AT = 360    # PCBs from this number on are the continuation worker's: connections in TIME_WAIT
T_SLOT_HEADS = 368      # [worker][PCB] first free slot's PCB + 1 of each listener; written by that worker
T_SLOT_QUEUES = 376     # [worker] pcq of free slots given to that worker, T_SLOT_QUEUE_BYTES apart
T_SLOT_QUEUE_BYTES = 384
T_STOP = 392            # 1: workers finish their burst and leave
T_KCONT = 400           # pcq of continuations: PCB numbers
T_KCONT_WAKE = 448      # own line: wake object of the continuation worker
T_TIME_WAIT_NS = 512    # how long TIME_WAIT lasts
T_KCONT_UNTIL = 520     # until when the continuation worker sleeps, if it does; its own word
T_KCONT_SWEEP = 528     # 1: the pcq was full, or a worker died: the continuation worker looks at every PCB_DUE
T_KCONT_ROPE = 536      # descriptor of the ringing end of its doorbell, in all workers
T_HEADER = 4096

# -- PCB: 192 bytes. The first line is what a lookup compares -----------------------------------
PCB_STATE = 0           # PCB_FREE ... ; released last on insert, first word cleared on close
PCB_LOCAL_HI = 8
PCB_LOCAL_LO = 16       # an IPv4 address is in _LO, _HI is 0
PCB_REMOTE_HI = 24
PCB_REMOTE_LO = 32
PCB_KEY = 40            # local port:16 | remote port:16 | protocol:8 | class:8 | families:8 | flags:8
PCB_GROUP = 48          # reuseport group + 1; 0: none
PCB_NEXT = 56           # next PCB + 1 on the same port / of the raws / of the taps
PCB_OWNER = 64          # consumer number
PCB_GENERATION = 72
PCB_UID = 80
PCB_PID = 88
PCB_SEGMENT = 96        # ring segment number, and where in it the slot is:
PCB_SLOT_AT = 104       # (PCB_SLOT is a state)
PCB_RING = 112          # ring bytes of each lane
PCB_PREVIOUS = 120      # the PCB + 1 before this one in the chain of PCB_NEXT
PCB_KIND = 128          # PK_...
PCB_PLACE = 136         # connection: place of its slot
PCB_BUFFERS = 144       # connection: log2 of the send ring's bytes:8 | of the receive ring's:8
PCB_DUE = 152           # connection: when the continuation worker will run it, CLOCK_MONOTONIC ns; 0: not pending
PCB_LISTENER = 160      # connection: the listener's PCB + 1; 0: opened by connect
PCB_WORKER = 168        # connection: RX worker in whose list the slot is when it is free
PCB_BACKLOG = 176       # listener: connections that may wait to be accepted
PCB_WANT = 184          # listener: 1: a worker is short of slots; 2: and the supervisor knows
PCB_DEPTH = 184         # slot: free ones in its worker's list from it on
PCB_RETURN = 176        # connection: 1: its slot is on its way into a slot queue; the continuation worker's
PCB_BYTES = 192
PCB_TW_NUMBERS = 136    # TIME_WAIT: RCV_NXT:32 | SND_NXT:32, wire
PCB_TW_STAMPS = 144     # TIME_WAIT: TS_RECENT:32 | what is added to the clock in TSval:32
PCB_TW_FLAGS = 152      # TIME_WAIT: TF_...:16 | scaled window:16
PCB_TW_UNTIL = 160      # TIME_WAIT: CLOCK_MONOTONIC ns
PCB_FREE, PCB_OPEN, PCB_CLOSING, PCB_SLOT = 0, 1, 2, 3      # PCB_SLOT: a connection's slot without one
PK_PLAIN, PK_LISTEN, PK_CONNECTION, PK_TIME_WAIT = 0, 1, 2, 3
KEY_FAMILY4, KEY_FAMILY6 = 1, 2         # families
KEY_REUSEPORT = 1                       # flags

# Lookup classes, in the order in which they are tried, and their bits in T_PORTS.
CLASS_CONNECTED, CLASS_HALF, CLASS_BOUND, CLASS_WILDCARD, CLASS_ANY = 0, 1, 2, 3, 4
CLASS_RAW, CLASS_TAP = 5, 6

# -- bucket: one cache line, eight entries --------------------------------------------------------
BUCKET_LOCK = 0         # 0 or the writer's stamp
BUCKET_OVERFLOW = 8     # entries that would live here but had to go on to a later bucket
BUCKET_TAGS = 16        # u16 [8]; 0: empty. Stored after the index, cleared before it
BUCKET_PCBS = 32        # u32 [8]
BUCKET_BYTES = 64

# -- reuseport group: an indirection table, as in RSS -----------------------------------------------
GROUP_MEMBERS = 0       # how many
GROUP_SLOTS = 8         # u32 [GROUP_SIZE]: PCB of each slot
GROUP_SIZE = 256
GROUP_BYTES = 8 + 4 * GROUP_SIZE + 56

# -- worker block: 4 KiB and scratch, one page-aligned block per worker -------------------------------
W_INDEX = 0
W_TABLE = 8             # the table's place in the arena
W_STAMP = 16            # what this worker writes into locks; never used again by another
W_LANES = 24            # its lane states
W_MONOTONIC = 40        # CLOCK_MONOTONIC, ns, of the current step
W_NIF_COUNT = 48
W_BURST = 56            # packet descriptors of the current burst
W_DIRTY_COUNT = 64
W_DIRTY = 72            # lanes staged in this burst, int64 [sockets][2]: lane state, its LS_COUNT before
W_TX_COUNT = 80         # frames waiting to be transmitted in this step
W_TX_BURST = 88         # their descriptors
W_TX_BUFFER = 96        # their bytes: TX_BUFFER_BYTES
W_TX_USED = 104
W_FRAGMENTS = 112       # reassembly area
W_CONSUMERS = 120       # home segments that this worker transmits for, int64 [CONSUMERS_MAX]
W_CONSUMER_COUNT = 128
W_PENDING = 136         # frames that wait for a neighbour's address
W_ICMP_TOKENS = 144     # errors that may be sent now, and when tokens were last added
W_ICMP_TIME = 152
W_ICMP_RATE = 160       # errors a second
W_IPID = 168            # identification of the next datagram sent
W_SLEPT = 176           # statistics: how often it slept
W_STEPS = 184
W_PID = 192
W_TX_LANES = 200        # private head and tail of the transmit lanes, [CONSUMERS_MAX][2]
W_CONSUMER_IDS = 208    # consumer number of each, int64 [CONSUMERS_MAX]
W_EVENTS = 216          # bells by number, int64 [EVENTS_MAX][2]: ringing end or -1, consumer that owns it
W_DELIVERED = 224       # frames and deliveries staged but not yet published: they enter the
W_DELIVERIES = 232      # ledger's row after the publish
W_TX_REFUSED = 248      # transmit records that could not be sent (hostile, no route, too large)
W_SCRATCH = 256         # 256 bytes for timespecs, pollfds and headers
W_BLOCKED = 512         # the last round left frames of a backpressured netif for later
W_TCP_COUNT = 520       # connections that got segments in this burst
W_TCP_DIRTY = 528       # their PCB numbers, int64 [BURST]
W_TCP_EXCHANGE = 536    # exchange block (layout_tcp.X_...)
W_SYN_CACHE = 544
W_RST_TOKENS = 552      # as W_ICMP_...: resets
W_RST_TIME = 560
W_WANT = 568            # 1: a listener is short of slots: the worker's Python tells the supervisor
W_EPOCH = 576           # own line: epoch last passed; EPOCH_IDLE while it sleeps
W_MAILBOX = 704         # own line: set by the supervisor: a message waits on the control socket
W_NIF = 1024            # int64 [NIF_MAX]: its queues
W_RST_RATE = 712
W_KCONT = 768           # continuation worker: its private area (kcont/area.py)
W_SEGMENT = 1536        # W_SEGMENT_BYTES: the TCP segment that is being sent, and where it goes (inet/tcp_transmit.py)
W_SEGMENT_BYTES = 512
W_BYTES = 4096
NIF_MAX = 64
BURST = 64              # frames of one burst
TX_BURST = 128
TX_BUFFER_BYTES = 1 << 18
CONSUMERS_MAX = 4096
EVENTS_MAX = 65536
EPOCH_IDLE = 0x7FFF_FFFF_FFFF_FFFF

# -- packet descriptor: 192 bytes, private to a worker -------------------------------------------------
# The netif fills the first seven; ip_input and the transport fill the others.
P_FRAME = 0             # place of the first byte in the arena
P_LENGTH = 8            # bytes there
P_WIRE = 16             # bytes that the frame had on the wire (more, if the capture cut it)
P_TIME = 24             # ns
P_LINK = 32             # LINK_...
P_FLAGS = 40            # PF_...
P_VLAN = 48             # outer tag control information; -1: untagged
P_L3 = 56               # place of the IP header
P_L3_LENGTH = 64        # bytes of the IP packet, padding trimmed
P_L4 = 72               # place of the transport header
P_PROTO = 80            # transport protocol
P_FAMILY = 88           # 4 or 6; 0: not IP
P_PAYLOAD = 96          # place of the transport payload
P_PAYLOAD_LENGTH = 104
P_PORTS = 112           # source port:16 | destination port:16 (destination in the lower half)
P_HASH = 120
P_SOURCE_HI = 128
P_SOURCE_LO = 136
P_TARGET_HI = 144
P_TARGET_LO = 152
P_FRAMES = 160          # frames of the ledger that this packet stands for (fragments: several)
P_VERDICT = 168         # what became of it: a PCB, or a negative reason
P_CLASS = 176           # first lookup class worth trying
P_SEGMENT = 112         # transmit, with NF_TX_SEGMENT: bytes of data in each packet on the wire; 0: as it is
P_NIF = 184
P_BYTES = 192

PF_CHECKSUM_OK = 1      # a device verified the transport checksum
PF_CHECKSUM_PARTIAL = 2  # a local sender left the transport checksum to a device
PF_MULTICAST = 4        # destination is a group or a broadcast address
PF_REASSEMBLED = 8
PF_OUTGOING = 16        # seen on its way out of this machine
PF_LINK_MULTICAST = 32  # the link-layer destination is a group address
PF_DELIVERED = 64       # a copy was already published (tap); the rest adds deliveries only
PF_OTHERHOST = 128      # link-layer destination is another machine's (promiscuous mode)

LINK_ETHERNET, LINK_RAW, LINK_SLL, LINK_SLL2, LINK_NULL = 1, 101, 113, 276, 0

# -- netif queue: one netif as one worker sees it -------------------------------------------------------
N_RX = 0                # address of rx(base, nif, burst, max) -> frames | 0 | NIF_ENDED | -errno
N_DONE = 8              # address of done(base, nif, frames): these frames' memory is free again
N_TX = 16               # address of tx(base, nif, burst, count) -> frames taken; 0: cannot transmit
N_INDEX = 24            # which netif
N_QUEUE = 32            # which queue: the worker's number
N_QUEUES = 40
N_LINK = 48             # LINK_... of what tx takes
N_FLAGS = 56            # NF_...
N_FD = 64               # descriptor to sleep on; -1: none
N_MTU = 72
N_STATUS = 80           # NS_...
N_ERROR = 88            # why it is NS_FAILED: the kind's own code
N_ERROR_AT = 96         # and at which frame
N_START = 104           # sockets that must be open before the first frame
N_NEXT = 112            # earliest CLOCK_MONOTONIC ns at which rx can have something; 0: any time
N_MAC = 120             # our link-layer address, 6 bytes
N_TX_PACKETS = 128
N_TX_BYTES = 136
N_TX_DROPPED = 144
N_GATEWAY4 = 152        # next hop, 0: none
N_GATEWAY6_HI = 160
N_GATEWAY6_LO = 168
N_ADDRESS_COUNT = 176
N_KERNEL_DROPPED = 184  # frames for which the kernel had no room, so far: offered, too. The supervisor's word
N_FDS_SYN = 192         # [2] others, with SYNs alone, the more urgent one first; -1: none
N_ADDRESSES = 208       # [ADDRESS_MAX] of ADDRESS_BYTES
ADDRESS_FAMILY = 0      # 4 or 6
ADDRESS_PREFIX = 8      # bits
ADDRESS_HI = 16
ADDRESS_LO = 24
ADDRESS_BYTES = 32
ADDRESS_MAX = 16
N_LEDGER = 1024         # the ledger row: L_...
N_PRIVATE = 2048        # 2 KiB for the kind's own state
N_BYTES = 4096

NF_PASSIVE = 1          # no addresses: take every packet, transmit nothing
NF_BACKPRESSURE = 2     # wait for full rings instead of dropping
NF_TX_CHECKSUM = 4      # tx takes PF_CHECKSUM_PARTIAL: at P_L4, with the pseudo header's sum in the checksum field
NF_TX_SEGMENT = 8       # tx cuts TCP packets of up to 64 KB into P_SEGMENT bytes of data each (0: none to cut)
NS_RUNNING, NS_ENDED, NS_FAILED = 0, 1, 2
NIF_ENDED = -4096       # rx: no frame will ever come again (lower than any -errno)
NIF_FAILED = -4097      # rx: ended because of N_ERROR at N_ERROR_AT

# -- ledger row -----------------------------------------------------------------------------------------
L_OFFERED = 0
L_DELIVERED = 8
L_DELIVERIES = 16
L_HELD = 24             # frames in reassembly now
L_REASONS = 32          # int64 [L_REASON_MAX], by reason code
L_REASON_MAX = 96

# -- neighbour table entry: 64 bytes -----------------------------------------------------------------------
NB_LOCK = 0             # owner-stamped lock
NB_VERSION = 8          # odd while it is written
NB_HI = 16
NB_LO = 24
NB_NIF = 32             # netif index + 1; 0: empty
NB_MAC = 40             # lower 48 bits
NB_TIME = 48            # CLOCK_MONOTONIC ns of the last confirmation
NB_STATE = 56           # state:8 | CLOCK_MONOTONIC µs when it was last asked for (inet/neighbour_table.py)
NB_BYTES = 64


def fingerprint() -> int:
    """Hash of every number in this file and in layout_tcp: two processes that agree on it agree on the layout."""
    numbers = sorted((name, value) for names in (globals(), vars(layout_tcp)) for name, value in names.items()
                     if name.isupper() and isinstance(value, int))
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "little")


assert LANE_DATA % 128 == 0 and RECORD_DATA == RECORD_ALIGN
assert LS_DROPPED + 8 == LS_BYTES and PCB_WANT + 8 <= PCB_BYTES
assert BUCKET_PCBS + 8 * 4 == BUCKET_BYTES == CACHE_LINE
assert W_SCRATCH + 256 <= W_EPOCH - 64 and W_NIF + 8 * NIF_MAX <= W_SEGMENT and W_SEGMENT + W_SEGMENT_BYTES <= W_BYTES
assert N_ADDRESSES + ADDRESS_MAX * ADDRESS_BYTES <= N_LEDGER
assert N_LEDGER + L_REASONS + 8 * L_REASON_MAX <= N_PRIVATE
assert WAKE_EVENT + 8 <= WAKE_BYTES <= SLOT_LANES
assert HOME_POLLERS + HOME_MAX_POLLERS * WAKE_BYTES <= HOME_TX
