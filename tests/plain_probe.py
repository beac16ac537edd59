"""A kernel that uses every intrinsic: compiled, and in plain mode (test_plain.py)."""

from __future__ import annotations

from dataplane.jit import kernel
from dataplane.shm import atomics as A


@kernel("i64(mem, i64, i64)")
def probe(mem, a, b):
    """All of them, on two words; results from 256 on, and one returned."""
    A.st64(mem, 0, a)
    A.put_be64(mem, 8, b)
    A.st64(mem, 256, A.ld8(mem, 3) + A.ld16(mem, 3) + A.ld32(mem, 3))
    A.st64(mem, 264, A.be16(mem, 5) + A.be32(mem, 5))
    A.st64(mem, 272, A.be64(mem, 5) ^ A.ld64(mem, 5))
    A.st8(mem, 280, a)
    A.st16(mem, 281, a)
    A.st32(mem, 283, a)
    A.put_be16(mem, 287, b)
    A.put_be32(mem, 289, b)
    A.st64(mem, 296, A.shr(a, b & 63))
    A.st64(mem, 304, A.fold(a, b))
    A.st64(mem, 312, A.ctz(a))
    A.st64(mem, 320, A.cas(mem, 0, a, b) + 2 * A.cas(mem, 0, a + 1, b))
    A.st64(mem, 328, A.exchange(mem, 0, a))
    A.st64(mem, 336, A.fetch_add(mem, 0, b))
    A.st64(mem, 344, A.cas32(mem, 0, a + b, b))
    A.st64(mem, 352, A.crc32(a, b))
    A.st64(mem, 360, A.match8(mem, 0, a))
    A.st64(mem, 368, A.bswap32(a) + A.bswap16(b))
    A.copy(mem, 376, 256, 100)
    A.fill(mem, 480, a, 7)
    product = a * b
    A.st64(mem, 488, product // 1000)
    A.st64(mem, 496, (a << (b & 63)) >> 3)
    product *= a
    A.st64(mem, 504, product % 1009)
    return a // 7 + b % 7
