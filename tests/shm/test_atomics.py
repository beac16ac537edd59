"""Each intrinsic against plain Python, and in the machine code that comes out."""

from __future__ import annotations

import functools
import platform
import re
import struct
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from dataplane.jit import callback
from dataplane.rings import pcq, wake
from dataplane.shm import atomics, epoch
from dataplane.shm.atomics import view

SIZE = 256
x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other machines' instructions")

int64 = st.integers(-(2**63), 2**63 - 1)
memory = st.binary(min_size=SIZE, max_size=SIZE)
offset = st.integers(0, SIZE - 8)       # plain accesses need no alignment
aligned = st.integers(0, SIZE // 8 - 1).map(lambda n: 8 * n)


@functools.cache
def compiled(name: str, arity: int, with_memory: bool = True) -> Any:
    """The intrinsic in a freshly compiled function of its own: never from the cache."""
    f = getattr(atomics, name)
    if with_memory:
        m = atomics.as_memory       # as the entry points of kernels do
        return {0: njit(lambda mem: f(m(mem))), 1: njit(lambda mem, a: f(m(mem), a)),
                2: njit(lambda mem, a, b: f(m(mem), a, b)), 3: njit(lambda mem, a, b, c: f(m(mem), a, b, c))}[arity]
    return {0: njit(lambda: f()), 1: njit(lambda a: f(a)), 2: njit(lambda a, b: f(a, b))}[arity]


def array(data: bytes) -> Any:
    return np.frombuffer(bytearray(data), np.uint8)


def signed(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


# -- access ------------------------------------------------------------------------------------

# Name to the format of the struct module.
LOADS = {"ld8": "=B", "ld16": "=H", "ld32": "=I", "ld64": "=q", "be16": ">H", "be32": ">I", "be64": ">q"}
STORES = {"st8": "=B", "st16": "=H", "st32": "=I", "st64": "=q",
          "put_be16": ">H", "put_be32": ">I", "put_be64": ">q"}
ATOMIC_LOADS = {"load_acquire": "=q", "load_relaxed": "=q", "load_acquire32": "=I"}
ATOMIC_STORES = {"store_release": "=q", "store_relaxed": "=q", "store_release32": "=I"}


@pytest.mark.parametrize("name, form", (LOADS | ATOMIC_LOADS).items())
@given(data=memory, at=offset)
def test_loads(name: str, form: str, data: bytes, at: int) -> None:
    at = at & -8 if name in ATOMIC_LOADS else at
    assert compiled(name, 1)(array(data), at) == struct.unpack_from(form, data, at)[0]


@pytest.mark.parametrize("name, form", (STORES | ATOMIC_STORES).items())
@given(data=memory, at=offset, value=int64)
def test_stores(name: str, form: str, data: bytes, at: int, value: int) -> None:
    at = at & -8 if name in ATOMIC_STORES else at
    mem, expected = array(data), bytearray(data)
    compiled(name, 2)(mem, at, value)
    size = struct.calcsize(form)
    bits = (value % 2**64) % 2**(8 * size)
    struct.pack_into(form, expected, at, signed(bits) if size == 8 else bits)
    assert mem.tobytes() == bytes(expected)


@given(data=memory, at=aligned, operand=int64)
def test_read_modify_write(data: bytes, at: int, operand: int) -> None:
    before = struct.unpack_from("=q", data, at)[0]
    for name, after in (("fetch_add", signed(before + operand)), ("exchange", operand)):
        mem = array(data)
        assert compiled(name, 2)(mem, at, operand) == before
        assert struct.unpack_from("=q", mem, at)[0] == after


@given(data=memory, at=aligned, other=int64, desired=int64)
def test_compare_and_swap(data: bytes, at: int, other: int, desired: int) -> None:
    for name, form, bits in (("cas", "=q", 64), ("cas32", "=I", 32)):
        before = struct.unpack_from(form, data, at)[0]
        for expected in (before, other):
            mem = array(data)
            same = expected % 2**bits == before % 2**bits
            assert compiled(name, 3)(mem, at, expected, desired) == int(same)
            after = struct.unpack_from(form, mem, at)[0]
            assert after % 2**bits == (desired if same else before) % 2**bits
            assert mem[at + bits // 8:].tobytes() == data[at + bits // 8:]


def test_fences_and_hints_do_nothing_visible() -> None:
    mem = array(bytes(range(256)))
    for name in ("fence", "acquire", "pause"):
        compiled(name, 0, with_memory=False)()
    for name in ("prefetch", "prefetch_write"):
        compiled(name, 1)(mem, 64)
    assert mem.tobytes() == bytes(range(256))


def test_additions_of_two_threads_are_all_counted() -> None:
    mem = np.zeros(64, np.uint8)

    @njit(nogil=True)
    def count(mem, times):
        for _ in range(times):
            atomics.fetch_add(mem, 0, 1)

    count(mem, 0)
    threads = [threading.Thread(target=count, args=(mem, 200_000)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert mem[:8].view(np.int64)[0] == 400_000


# -- bulk --------------------------------------------------------------------------------------


@given(data=memory, size=st.integers(0, 128), source=st.integers(0, 100), gap=st.integers(0, 20),
       backwards=st.booleans())
def test_copy_writes_its_bytes_and_no_other(data: bytes, size: int, source: int, gap: int,
                                            backwards: bool) -> None:
    data = data + data
    target = source + size + gap
    if backwards:
        source, target = target, source
    mem, expected = array(data), bytearray(data)
    compiled("copy", 3)(mem, target, source, size)
    expected[target:target + size] = data[source:source + size]
    assert mem.tobytes() == bytes(expected)


@pytest.mark.parametrize("size", [*range(140), 1500, 4096])
def test_copy_of_every_size(size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, 3 * 4096, np.uint8)
    mem = data.copy()
    compiled("copy", 3)(mem, 5000, 3, size)
    data[5000:5000 + size] = data[3:3 + size]
    assert (mem == data).all()


@given(data=memory, at=st.integers(0, 100), value=st.integers(0, 255), size=st.integers(0, 156))
def test_fill(data: bytes, at: int, value: int, size: int) -> None:
    mem = array(data)
    compiled("fill", 3)(mem, at, value, size)
    assert mem.tobytes() == data[:at] + bytes([value]) * size + data[at + size:]


@given(data=memory, at=st.integers(0, 100), size=st.integers(0, 156))
def test_view(data: bytes, at: int, size: int) -> None:
    assert _total()(array(data), at, size) == sum(data[at:at + size])


@functools.cache
def _total() -> Any:
    @njit
    def total(mem, at, size):
        s = 0
        for byte in view(mem, at, size):
            s += byte
        return s
    return total


# -- arithmetic --------------------------------------------------------------------------------


@given(value=int64, bits=st.integers(0, 63))
def test_logical_shift(value: int, bits: int) -> None:
    assert compiled("shr", 2, False)(value, bits) == signed((value % 2**64) >> bits)


@given(a=int64, b=int64)
def test_fold(a: int, b: int) -> None:
    product = (a % 2**64) * (b % 2**64)
    assert compiled("fold", 2, False)(a, b) == signed((product >> 64) ^ (product % 2**64))


@given(value=int64)
def test_count_trailing_zeros(value: int) -> None:
    expected = (value & -value).bit_length() - 1 if value else 64
    assert compiled("ctz", 1, False)(value) == expected


@given(value=int64)
def test_byte_swaps(value: int) -> None:
    for name, size in (("bswap16", 2), ("bswap32", 4)):
        low = value % 2**(8 * size)
        assert compiled(name, 1, False)(value) == int.from_bytes(low.to_bytes(size, "little"), "big")


@given(tags=st.lists(st.integers(0, 3) | st.integers(0, 0xFFFF), min_size=8, max_size=8),
       tag=st.integers(0, 3) | st.integers(0, 0xFFFF), at=st.integers(0, 200))
def test_match8(tags: list[int], tag: int, at: int) -> None:
    mem = np.zeros(SIZE, np.uint8)
    mem[at:at + 16] = np.array(tags, np.uint16).view(np.uint8)
    assert compiled("match8", 2)(mem, at, tag) == sum(1 << i for i, value in enumerate(tags) if value == tag)


def crc32c(crc: int, data: bytes) -> int:
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc


@given(crc=st.integers(0, 2**32 - 1), value=int64)
def test_crc32_and_its_portable_twin(crc: int, value: int) -> None:
    expected = crc32c(crc, struct.pack("<q", value))
    assert compiled("crc32", 2, False)(crc, value) == expected
    assert compiled("crc32_portable", 2, False)(crc, value) == expected


def test_crc32_of_rfc_3720() -> None:
    # RFC 3720 B.4: 32 bytes of zeros, of ones.
    for byte, expected in ((0, 0x8A9136AA), (0xFF, 0x62A8AB43)):
        crc = 0xFFFFFFFF
        for _ in range(4):
            crc = compiled("crc32", 2, False)(crc, signed(int.from_bytes(bytes([byte]) * 8, "little")))
        assert crc ^ 0xFFFFFFFF == expected


# -- calls -------------------------------------------------------------------------------------


@callback(1)
def _one(base, a):
    mem = atomics.as_memory(base)
    atomics.st64(mem, 0, a)
    return a + 1


@callback(3)
def _three(base, a, b, c):
    mem = atomics.as_memory(base)
    atomics.st64(mem, a, b)
    return atomics.ld64(mem, a) * c


def test_calls_through_an_address() -> None:
    mem = np.zeros(64, np.uint8)
    call1 = njit(lambda address, mem, a: atomics.call1(address, mem, a))
    call3 = njit(lambda address, mem, a, b, c: atomics.call3(address, mem, a, b, c))
    assert call1(_one.address, mem, 41) == 42
    assert call3(_three.address, mem, 8, 6, -7) == -42
    assert mem[:16].view(np.int64).tolist() == [41, 6]


# -- machine code ------------------------------------------------------------------------------


def machine_code(function: Any) -> str:
    """Instructions of a compiled function, one a line, tabs as blanks, without the wrappers for Python."""
    return "\n".join(" ".join(line.split()) for text in function.inspect_asm().values()
                     for line in text.splitlines())


def after_one_call(name: str, arity: int, with_memory: bool = True) -> str:
    function = compiled(name, arity, with_memory)
    function(*([np.zeros(64, np.uint8)] if with_memory else []), *[0] * arity)
    return machine_code(function)


FULL_BARRIER = r"^(mfence|lock or[lq] \$0, )"
CODE = [
    ("cas", 3, True, r"^lock cmpxchgq"),
    ("cas32", 3, True, r"^lock cmpxchgl"),
    ("exchange", 2, True, r"^xchgq .*\("),       # xchg with memory locks by itself
    ("fetch_add", 2, True, r"^lock xaddq"),
    ("fence", 0, False, FULL_BARRIER),
    ("pause", 0, False, r"^pause"),
    ("prefetch", 1, True, r"^prefetcht0 "),
    ("prefetch_write", 1, True, r"^prefetch(w|t0) "),
    ("crc32", 2, False, r"^crc32q"),
]


@x86
@pytest.mark.parametrize("name, arity, with_memory, instruction", CODE, ids=[row[0] for row in CODE])
def test_instructions(name: str, arity: int, with_memory: bool, instruction: str) -> None:
    assert re.search(instruction, after_one_call(name, arity, with_memory), re.MULTILINE)


@x86
def test_what_costs_nothing_costs_nothing() -> None:
    for name, arity in (("load_acquire", 1), ("store_release", 2), ("load_relaxed", 1), ("store_relaxed", 2)):
        code = after_one_call(name, arity)
        assert not re.search(rf"^(lock cmpxchg|lock xadd|xchgq .*\()|{FULL_BARRIER}", code, re.MULTILINE), name


@x86
def test_real_kernels_have_their_instructions() -> None:
    """The kernels' own source, compiled here and now: what is loaded from the cache has no text."""
    def fresh(kernel: Any) -> str:
        function = njit(kernel.inner.py_func)
        function.compile(kernel.arguments)
        return machine_code(function)

    put = fresh(pcq._put)
    assert re.search(r"^lock cmpxchgq", put, re.MULTILINE)
    assert re.search(r"^lock xaddq", fresh(epoch.advance), re.MULTILINE)
    assert re.search(FULL_BARRIER, fresh(epoch.mark_online), re.MULTILINE)
    ring = fresh(wake.ring_wake)
    assert re.search(r"^xchgq .*\(", ring, re.MULTILINE) and "syscall" in ring


def test_a_spin_loop_sees_the_store_of_another_thread() -> None:
    """A plain load would be hoisted out of the loop, which then never ends."""
    mem = np.zeros(64, np.uint8)

    @njit(nogil=True)
    def spin(mem, limit):
        for i in range(limit):
            if atomics.load_acquire(mem, 0) != 0:
                return i
            atomics.pause()
        return -1

    spin(mem, 1)
    result: list[int] = []
    thread = threading.Thread(target=lambda: result.append(spin(mem, 1 << 40)), daemon=True)
    thread.start()
    compiled("store_release", 2)(mem, 0, 1)
    thread.join(60)
    assert result and result[0] >= 0
