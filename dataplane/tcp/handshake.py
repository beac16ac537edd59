"""What is known of a handshake between the SYN and the ACK that completes it: numbers only.

The words of an entry of the SYN cache (syncache.py), and of the facts that inet/tcp_listen puts together for one
segment and that cookie.py works on. Private to a worker. As in shm/layout.py; u32 words are at places that say so.
"""

from __future__ import annotations

from dataplane.shm import layout_tcp as T

E_SOURCE_HI = 0         # the key: addresses and ports as the peer's packets have them
E_SOURCE_LO = 8
E_TARGET_HI = 16
E_TARGET_LO = 24
E_PORTS = 32            # P_PORTS | family << 32
E_IRS = 40              # u32: the peer's initial sequence number
E_ISS = 44              # u32: ours, a cookie
E_TSVAL = 48            # u32: of the peer's last SYN
E_TS_OFFSET = 52        # u32: what is added to our clock in TSval
E_MSS = 56              # u32: the peer's
E_FLAGS = 64            # EF_...
E_SHIFT = 72            # of the windows that the peer tells
E_LISTENER = 80         # PCB number:32 | its generation:32
E_NIF = 88              # netif queue that the SYN came through
E_HASH = 96             # of the key, filled by syn_find
E_TRIES = 104           # SYN-ACKs sent again
E_BYTES = 128

EF_SACK, EF_TIMESTAMPS, EF_SCALE = T.TF_SACK, T.TF_TIMESTAMPS, T.TF_SCALE
