"""What the bytes of a packet mean: header offsets, accessors, builders. No state, no policy.

Every format is one file that cites its RFC. Accessors take `mem` and the place of the header
and read without checking: whoever hands a place on has checked that the header fits (ip_input
for received packets; the one who reserved the room for packets that we build).

Numbers are Python's: an address, port or length read from the wire is the value in host order
(10.0.0.1 is 0x0A000001). A MAC address is an integer of 48 bits. The one exception is
`checksum`, whose sums are of the words as the host loads them.
"""
