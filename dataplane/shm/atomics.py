"""Atomics, fences and raw memory access for kernels: all LLVM IR of the project.

Called by every kernel. Memory is one byte array, `mem`, and an `int64` byte offset;
every value is an `int64` (numba turns `uint64` with `int64` into `float64`, so there is one
integer type). Addresses are made by GEP from the array's data pointer, never from integers:
LLVM may then reason about them, and a miscompile of the other way has existed.

Plain accesses (`ld8` ... `st64`, `be16` ... `put_be64`) may be torn, merged or moved by the
compiler; they need no alignment. Atomic accesses need natural alignment and are never torn:

    load_acquire    later accesses stay behind it
    store_release   earlier accesses stay before it
    load_relaxed    only not torn, and done each time (a plain load in a spin loop is hoisted)
    store_relaxed   only not torn, and done
    cas, fetch_add, exchange, fence      sequentially consistent

On x86 acquire and release cost nothing but the compiler's restraint; the read-modify-writes
are `lock` instructions and `fence` is a full barrier.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import binding as llvm
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic as _numba_intrinsic
from numba.extending import register_jitable

__all__ = [
    "acquire", "as_memory", "be16", "be32", "be64", "bswap16", "bswap32", "call1", "call2", "call3",
    "cas", "cas32", "copy", "crc32", "crc32_portable", "ctz", "exchange", "fence", "fetch_add", "fill",
    "fold", "ld8", "ld16", "ld32", "ld64", "load_acquire", "load_acquire32", "load_relaxed", "match8",
    "pause", "plus", "pointer", "prefetch", "prefetch_write", "put_be16", "put_be32", "put_be64", "remainder",
    "shr", "st8", "st16", "st32", "st64", "store_release", "store_release16", "store_release32", "store_relaxed",
    "view",
]

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_I128 = ir.IntType(128)
_PTR = _I8.as_pointer()
int64 = types.int64


def intrinsic(declare: Any) -> Any:
    """Numba's decorator; what it makes is known to numba only."""
    return _numba_intrinsic(declare)


def _base(context: Any, builder: Any, typ: Any, value: Any) -> Any:
    """Pointer to byte 0 of `mem`, which is an array or already that pointer."""
    if isinstance(typ, types.Array):
        return context.make_array(typ)(context, builder, value).data
    return value


def _address(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """Pointer to byte `args[1]` of `args[0]`."""
    return builder.gep(_base(context, builder, signature.args[0], args[0]), [args[1]])


def _widen(builder: Any, value: Any) -> Any:
    return value if value.type.width == 64 else builder.zext(value, _I64)


def _narrow(builder: Any, value: Any, typ: Any) -> Any:
    return value if typ.width == 64 else builder.trunc(value, typ)


def _loader(typ: Any, swap: bool = False, ordering: str | None = None) -> Any:
    def declare(typingctx: Any, mem: Any, offset: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = builder.bitcast(_address(context, builder, signature, args), typ.as_pointer())
            if ordering is None:
                value = builder.load(pointer, align=1)
            else:
                value = builder.load_atomic(pointer, ordering, typ.width // 8)
            return _widen(builder, builder.bswap(value) if swap else value)
        return int64(mem, int64), generate
    return intrinsic(declare)


def _storer(typ: Any, swap: bool = False, ordering: str | None = None) -> Any:
    def declare(typingctx: Any, mem: Any, offset: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = builder.bitcast(_address(context, builder, signature, args), typ.as_pointer())
            number = _narrow(builder, args[2], typ)
            number = builder.bswap(number) if swap else number
            if ordering is None:
                builder.store(number, pointer, align=1)
            else:
                builder.store_atomic(number, pointer, ordering, typ.width // 8)
            return context.get_dummy_value()
        return types.void(mem, int64, int64), generate
    return intrinsic(declare)


# -- plain access: host order, then network order ------------------------------------------

ld8, ld16, ld32, ld64 = (_loader(t) for t in (_I8, _I16, _I32, _I64))
st8, st16, st32, st64 = (_storer(t) for t in (_I8, _I16, _I32, _I64))
be16, be32, be64 = (_loader(t, swap=True) for t in (_I16, _I32, _I64))
put_be16, put_be32, put_be64 = (_storer(t, swap=True) for t in (_I16, _I32, _I64))

# -- atomic access -------------------------------------------------------------------------

load_acquire, load_acquire32 = (_loader(t, ordering="acquire") for t in (_I64, _I32))
store_release, store_release32, store_release16 = (_storer(t, ordering="release") for t in (_I64, _I32, _I16))
load_relaxed = _loader(_I64, ordering="monotonic")
store_relaxed = _storer(_I64, ordering="monotonic")


def _compare_and_swap(typ: Any) -> Any:
    def declare(typingctx: Any, mem: Any, offset: Any, expected: Any, desired: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = builder.bitcast(_address(context, builder, signature, args), typ.as_pointer())
            old, new = (_narrow(builder, value, typ) for value in args[2:4])
            pair = builder.cmpxchg(pointer, old, new, "seq_cst", "seq_cst")
            return builder.zext(builder.extract_value(pair, 1), _I64)
        return int64(mem, int64, int64, int64), generate
    return intrinsic(declare)


def _read_modify_write(operation: str) -> Any:
    def declare(typingctx: Any, mem: Any, offset: Any, operand: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = builder.bitcast(_address(context, builder, signature, args), _I64.as_pointer())
            return builder.atomic_rmw(operation, pointer, args[2], "seq_cst")
        return int64(mem, int64, int64), generate
    return intrinsic(declare)


cas = _compare_and_swap(_I64)        # 1 if the word was `expected` and is now `desired`, else 0
cas32 = _compare_and_swap(_I32)
fetch_add = _read_modify_write("add")     # the value before
exchange = _read_modify_write("xchg")     # the value before


@intrinsic
def acquire(typingctx: Any) -> Any:
    """Acquire fence: loads before it are done before any access behind it. Free on x86."""
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("acquire")
        return context.get_dummy_value()
    return types.void(), generate


@intrinsic
def fence(typingctx: Any) -> Any:
    """Full barrier: no access moves over it in either direction, stores drain before loads."""
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()
    return types.void(), generate


# -- hints ---------------------------------------------------------------------------------

_X86 = platform.machine() in ("x86_64", "AMD64")
_SSE42 = _X86 and bool(llvm.get_host_cpu_features().get("sse4.2", False))


@intrinsic
def pause(typingctx: Any) -> Any:
    """Tells the core that this is a spin loop (`pause` on x86; elsewhere nothing)."""
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _X86:
            function = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.VoidType(), []), "llvm.x86.sse2.pause")
            builder.call(function, [])
        return context.get_dummy_value()
    return types.void(), generate


def _prefetcher(write: int) -> Any:
    def declare(typingctx: Any, mem: Any, offset: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            typ = ir.FunctionType(ir.VoidType(), [_PTR, _I32, _I32, _I32])
            function = cgutils.get_or_insert_function(builder.module, typ, "llvm.prefetch.p0i8")
            pointer = _address(context, builder, signature, args)
            builder.call(function, [pointer, _I32(write), _I32(3), _I32(1)])
            return context.get_dummy_value()
        return types.void(mem, int64), generate
    return intrinsic(declare)


prefetch, prefetch_write = _prefetcher(0), _prefetcher(1)

# -- bulk ----------------------------------------------------------------------------------


def _move(builder: Any, target: Any, source: Any, size: Any) -> None:
    typ = ir.FunctionType(ir.VoidType(), [_PTR, _PTR, _I64, ir.IntType(1)])
    function = cgutils.get_or_insert_function(builder.module, typ, "llvm.memcpy.p0i8.p0i8.i64")
    builder.call(function, [target, source, size, ir.IntType(1)(0)])


@intrinsic
def _memcpy(typingctx: Any, mem: Any, target: Any, source: Any, size: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base = _base(context, builder, signature.args[0], args[0])
        _move(builder, builder.gep(base, [args[1]]), builder.gep(base, [args[2]]), args[3])
        return context.get_dummy_value()
    return types.void(mem, int64, int64, int64), generate


def _chunk_copier(size: int) -> Any:
    """Copies exactly `size` bytes, in registers."""
    def declare(typingctx: Any, mem: Any, target: Any, source: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            typ = ir.VectorType(_I8, size).as_pointer()
            base = _base(context, builder, signature.args[0], args[0])
            value = builder.load(builder.bitcast(builder.gep(base, [args[2]]), typ), align=1)
            builder.store(value, builder.bitcast(builder.gep(base, [args[1]]), typ), align=1)
            return context.get_dummy_value()
        return types.void(mem, int64, int64), generate
    return intrinsic(declare)


_copy8, _copy16, _copy32 = (_chunk_copier(size) for size in (8, 16, 32))


@register_jitable
def copy(mem: Any, target: Any, source: Any, size: Any) -> None:
    """Copies `size` bytes from `source` to `target`, which must not overlap.

    Small sizes are done with two overlapping moves in registers: a call of memcpy costs more
    than the copy itself at 60 bytes. Never reads or writes a byte outside the two ranges:
    what lies beyond a packet is somebody else's packet.
    """
    if size > 128:
        _memcpy(mem, target, source, size)
    elif size >= 32:
        _copy32(mem, target, source)
        if size > 64:
            _copy32(mem, target + 32, source + 32)
            if size > 96:
                _copy32(mem, target + 64, source + 64)
        _copy32(mem, target + size - 32, source + size - 32)
    elif size >= 16:
        _copy16(mem, target, source)
        _copy16(mem, target + size - 16, source + size - 16)
    elif size >= 8:
        _copy8(mem, target, source)
        _copy8(mem, target + size - 8, source + size - 8)
    else:
        for i in range(size):
            st8(mem, target + i, ld8(mem, source + i))


@intrinsic
def fill(typingctx: Any, mem: Any, target: Any, value: Any, size: Any) -> Any:
    """Sets `size` bytes at `target` to the byte `value`."""
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        typ = ir.FunctionType(ir.VoidType(), [_PTR, _I8, _I64, ir.IntType(1)])
        function = cgutils.get_or_insert_function(builder.module, typ, "llvm.memset.p0i8.i64")
        pointer = _address(context, builder, signature, args)
        builder.call(function, [pointer, builder.trunc(args[2], _I8), args[3], ir.IntType(1)(0)])
        return context.get_dummy_value()
    return types.void(mem, int64, int64, int64), generate


@intrinsic
def view(typingctx: Any, mem: Any, offset: Any, size: Any) -> Any:
    """`mem[offset:offset + size]` that owns nothing: no reference count is touched."""
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.return_type)(context, builder)
        context.populate_array(
            array, data=_address(context, builder, signature, args), shape=[args[2]],
            strides=[_I64(1)], itemsize=_I64(1), meminfo=None)
        return array._getvalue()
    return types.Array(types.uint8, 1, "C")(mem, int64, int64), generate


@intrinsic
def pointer(typingctx: Any, mem: Any, offset: Any) -> Any:
    """The byte's address as a `voidptr`, for libc."""
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _address(context, builder, signature, args)
    return types.voidptr(mem, int64), generate


@intrinsic
def as_memory(typingctx: Any, base: Any) -> Any:
    """`mem` as kernels pass it on: the pointer to byte 0 of an array, or a pointer itself.

    An array is seven machine words with a reference count; one word that is nobody's property
    makes calls between kernels twice as fast.
    """
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _base(context, builder, signature.args[0], args[0])
    return types.CPointer(types.uint8)(base), generate


# -- arithmetic that Python's integers do not have -----------------------------------------


@intrinsic
def shr(typingctx: Any, value: Any, bits: Any) -> Any:
    """Logical shift to the right of the 64 bits of `value`."""
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.lshr(args[0], args[1])
    return int64(int64, int64), generate


@intrinsic
def plus(typingctx: Any, a: Any, b: Any) -> Any:
    """Ones' complement sum of two 64-bit words: the carry is added back in."""
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pair = builder.uadd_with_overflow(args[0], args[1])
        return builder.add(builder.extract_value(pair, 0), builder.zext(builder.extract_value(pair, 1), _I64))
    return int64(int64, int64), generate


@intrinsic
def remainder(typingctx: Any, value: Any, divisor: Any) -> Any:
    """Of the 64 bits of `value` as an unsigned number. Compared with 0, it is a multiplication for a constant."""
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.urem(args[0], args[1])
    return int64(int64, int64), generate


@intrinsic
def fold(typingctx: Any, a: Any, b: Any) -> Any:
    """High half xor low half of the 128-bit product of `a` and `b` as unsigned numbers.

    The mixing step of wyhash: one multiplication, and every bit of both inputs matters.
    """
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        product = builder.mul(builder.zext(args[0], _I128), builder.zext(args[1], _I128))
        high = builder.trunc(builder.lshr(product, _I128(64)), _I64)
        return builder.xor(high, builder.trunc(product, _I64))
    return int64(int64, int64), generate


@intrinsic
def ctz(typingctx: Any, value: Any) -> Any:
    """Index of the lowest set bit; 64 if there is none."""
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.IntType(1)(0))
    return int64(int64), generate


@register_jitable
def bswap16(value: Any) -> Any:
    """The lower 16 bits of `value`, bytes exchanged."""
    return ((value & 0xFF) << 8) | ((value >> 8) & 0xFF)


@register_jitable
def bswap32(value: Any) -> Any:
    """The lower 32 bits of `value`, bytes reversed."""
    return (bswap16(value) << 16) | bswap16(value >> 16)


@intrinsic
def match8(typingctx: Any, mem: Any, offset: Any, tag: Any) -> Any:
    """Compares eight 16-bit tags at `offset` with `tag`: bit i set where the i-th is equal."""
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(_I16, 8)
        address = builder.bitcast(_address(context, builder, signature, args), vector.as_pointer())
        tags = builder.load(address, align=1)
        single = builder.insert_element(ir.Constant(vector, ir.Undefined),
                                        builder.trunc(args[2], _I16), _I32(0))
        zeros = ir.Constant(ir.VectorType(_I32, 8), None)
        spread = builder.shuffle_vector(single, ir.Constant(vector, ir.Undefined), zeros)
        return builder.zext(builder.bitcast(builder.icmp_unsigned("==", tags, spread), _I8), _I64)
    return int64(mem, int64, int64), generate


# -- crc32 ---------------------------------------------------------------------------------


@njit
def crc32_portable(crc: int, value: int) -> int:
    """CRC-32C (Castagnoli, RFC 3720 section 12.1) of the 8 bytes of `value`, bit by bit."""
    crc = (crc & 0xFFFFFFFF)
    for i in range(8):
        crc ^= (value >> (8 * i)) & 0xFF
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc


@intrinsic
def _crc32_x86(typingctx: Any, crc: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        typ = ir.FunctionType(_I64, [_I64, _I64])
        function = cgutils.get_or_insert_function(builder.module, typ, "llvm.x86.sse42.crc32.64.64")
        return builder.call(function, [args[0], args[1]])
    return int64(int64, int64), generate


crc32 = _crc32_x86 if _SSE42 else crc32_portable

# -- calls through an address --------------------------------------------------------------


def _caller(arity: int) -> Any:
    """`int64 (*)(uint8 *base, int64 ...)` at `address`, called with `mem`'s base pointer."""
    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        typ = ir.FunctionType(_I64, [_PTR] + [_I64] * arity)
        function = builder.inttoptr(args[0], typ.as_pointer())
        base = _base(context, builder, signature.args[1], args[1])
        return builder.call(function, [base, *args[2:]])
    return emit


@intrinsic
def call1(typingctx: Any, address: Any, mem: Any, a: Any) -> Any:
    """Calls the callback at `address` with one integer."""
    return int64(int64, mem, int64), _caller(1)


@intrinsic
def call2(typingctx: Any, address: Any, mem: Any, a: Any, b: Any) -> Any:
    """Calls the callback at `address` with two integers."""
    return int64(int64, mem, int64, int64), _caller(2)


@intrinsic
def call3(typingctx: Any, address: Any, mem: Any, a: Any, b: Any, c: Any) -> Any:
    """Calls the callback at `address` with three integers."""
    return int64(int64, mem, int64, int64, int64), _caller(3)
