"""Layout of the kernel's packet ring, TPACKET_V3 (linux/if_packet.h), and its constants. Numbers only.

A ring is a row of blocks. The kernel fills one with packets, hands it over by setting its status, and
takes the next; it comes round to a block only after we have given it back.

    block   +0 version | offset to private | status | packets | offset to first | bytes | seq_num (u64) ...
    packet  +0 next | sec | nsec | snaplen | len | status | mac (u16) | net (u16) | rxhash | vlan tci ...
            +48 sockaddr_ll           +mac the frame
"""

from __future__ import annotations

# -- struct tpacket_block_desc with tpacket_hdr_v1; u32 but for the sequence number
BLOCK_STATUS = 8
BLOCK_PACKETS = 12
BLOCK_FIRST = 16        # place of the first packet, from the block's start
BLOCK_NUMBER = 24       # u64: 1 for the first block ever filled, then one more each

# -- struct tpacket3_hdr; u32 but for the last ones
PACKET_NEXT = 0         # place of the next packet, from this one's start; 0: the block's last
PACKET_SECONDS = 4
PACKET_NANOSECONDS = 8
PACKET_CAPTURED = 12    # tp_snaplen: bytes of the frame that are here
PACKET_WIRE = 16        # tp_len: bytes that it had
PACKET_STATUS = 20
PACKET_MAC = 24         # u16: place of the frame, from this header's start
PACKET_VLAN_TCI = 32
PACKET_VLAN_TPID = 36   # u16
PACKET_TYPE = 48 + 10   # u8: sll_pkttype of the sockaddr_ll behind the header

# -- status of blocks and packets
STATUS_KERNEL = 0
STATUS_USER = 1 << 0
STATUS_CSUMNOTREADY = 1 << 3
STATUS_VLAN_VALID = 1 << 4
STATUS_VLAN_TPID_VALID = 1 << 6
STATUS_CSUM_VALID = 1 << 7

# -- sll_pkttype
TYPE_BROADCAST, TYPE_MULTICAST, TYPE_OTHERHOST, TYPE_OUTGOING = 1, 2, 3, 4

# -- socket options at SOL_PACKET
SOL_PACKET = 263
ADD_MEMBERSHIP = 1      # struct packet_mreq
RX_RING = 5             # struct tpacket_req3
STATISTICS = 6          # struct tpacket_stats_v3; reading sets it to zero
VERSION = 10
RESERVE = 12
VNET_HDR = 15
FANOUT = 18
QDISC_BYPASS = 20
IGNORE_OUTGOING = 23

TPACKET_V3 = 2
MR_PROMISC, MR_ALLMULTI = 1, 2
FANOUT_HASH = 0
FANOUT_FLAG_UNIQUEID, FANOUT_FLAG_DEFRAG = 0x2000, 0x8000

REQ3 = "7I"             # block size, blocks, frame size, frames, timeout ms, private bytes, features
MREQ = "iHH8s"          # interface, type, address length, address
STATS_V3 = "3I"         # packets, drops, queue freezes
FRAME_BYTES = 2048      # tp_frame_size means nothing to V3, but has to fit

ETH_P_ALL = 0x0003
VLAN_ETHERTYPE = 0x8100  # 802.1Q, where the kernel does not say
