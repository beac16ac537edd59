"""Syscalls and libc functions for kernels, in one place.

Called by netifs, wake objects and workers. Each wrapper takes `mem` and byte offsets, returns
what libc returns, and turns a failure into `-errno`, so that no caller has to ask for errno
before something else changes it. None of them raises; none of them keeps a pointer.
"""

from __future__ import annotations

import platform
from typing import Any

from numba import types

from dataplane.jit import inlined
from dataplane.shm.atomics import ld64, pointer, st64

__all__ = [
    "CLOCK_MONOTONIC", "CLOCK_REALTIME", "clock_ns", "futex_wait", "futex_wake", "poll", "ppoll", "read",
    "sched_yield", "send", "sendmmsg", "write", "writev",
]

CLOCK_REALTIME = 0
CLOCK_MONOTONIC = 1

# Shared between processes: no FUTEX_PRIVATE_FLAG. The timeout of the bitset form is absolute.
_FUTEX_WAKE, _FUTEX_WAIT_BITSET, _FUTEX_ANY = 1, 9, 0xFFFF_FFFF
_SYS_FUTEX = 202 if platform.machine() in ("x86_64", "AMD64") else 98    # 98: all newer architectures

_i32, _i64, _u64, _ptr = types.int32, types.int64, types.uint64, types.voidptr


def _external(name: str, result: Any, *arguments: Any) -> Any:
    return types.ExternalFunction(name, result(*arguments))


_errno_location = _external("__errno_location", types.CPointer(_i32))
_read = _external("read", _i64, _i32, _ptr, _u64)
_write = _external("write", _i64, _i32, _ptr, _u64)
_writev = _external("writev", _i64, _i32, _ptr, _i32)
_send = _external("send", _i64, _i32, _ptr, _u64, _i32)
_sendmmsg = _external("sendmmsg", _i32, _i32, _ptr, types.uint32, _i32)
_poll = _external("poll", _i32, _ptr, _u64, _i32)
_ppoll = _external("ppoll", _i32, _ptr, _u64, _ptr, _i64)     # the last one: no signal mask
_sched_yield = _external("sched_yield", _i32)
_clock_gettime = _external("clock_gettime", _i32, _i32, _ptr)
# futex(2) has no wrapper in libc: number, word, operation, value, timeout, second word, bits.
_syscall = _external("syscall", _i64, _i64, _ptr, _i64, _i64, _ptr, _ptr, _i64)


@inlined
def _result(value):
    return types.int64(value) if value >= 0 else -types.int64(_errno_location()[0])


@inlined
def read(mem, fd, target, size):
    """read(2): bytes read, 0 at the end, or -errno."""
    return _result(_read(fd, pointer(mem, target), size))


@inlined
def write(mem, fd, source, size):
    """write(2): bytes written or -errno."""
    return _result(_write(fd, pointer(mem, source), size))


@inlined
def writev(mem, fd, iov, count):
    """writev(2) of `count` struct iovec at `iov`: bytes written or -errno."""
    return _result(_writev(fd, pointer(mem, iov), count))


@inlined
def send(mem, fd, source, size, flags):
    """send(2): bytes sent or -errno."""
    return _result(_send(fd, pointer(mem, source), size, flags))


@inlined
def sendmmsg(mem, fd, messages, count, flags):
    """sendmmsg(2) of `count` struct mmsghdr at `messages`: messages sent or -errno."""
    return _result(_sendmmsg(fd, pointer(mem, messages), count, flags))


@inlined
def poll(mem, fds, count, timeout_ms):
    """poll(2) on `count` struct pollfd (8 bytes each) at `fds`: ready ones, 0, or -errno."""
    return _result(_poll(pointer(mem, fds), count, timeout_ms))


@inlined
def ppoll(mem, fds, count, timeout_ns, scratch):
    """ppoll(2) with the process's own signal mask: as `poll`, in ns. `scratch`: 16 bytes."""
    st64(mem, scratch, timeout_ns // 1_000_000_000)
    st64(mem, scratch + 8, timeout_ns % 1_000_000_000)
    return _result(_ppoll(pointer(mem, fds), count, pointer(mem, scratch), 0))


@inlined
def sched_yield():
    """sched_yield(2)."""
    return _result(_sched_yield())


@inlined
def clock_ns(mem, scratch, clock):
    """clock_gettime(2) in ns. `scratch`: 16 bytes of `mem` that are the caller's own."""
    _clock_gettime(clock, pointer(mem, scratch))
    return ld64(mem, scratch) * 1_000_000_000 + ld64(mem, scratch + 8)


@inlined
def futex_wait(mem, word, expected, deadline_ns, scratch):
    """futex(2): sleeps while the lower 32 bits of the word at `word` are `expected`. 0 when woken (or for
    no reason), -EAGAIN if they are something else, -ETIMEDOUT at `deadline_ns` of CLOCK_MONOTONIC, -EINTR.
    `scratch`: 16 bytes of the caller's own."""
    st64(mem, scratch, deadline_ns // 1_000_000_000)
    st64(mem, scratch + 8, deadline_ns % 1_000_000_000)
    return _result(_syscall(_SYS_FUTEX, pointer(mem, word), _FUTEX_WAIT_BITSET, expected,
                            pointer(mem, scratch), pointer(mem, word), _FUTEX_ANY))


@inlined
def futex_wake(mem, word):
    """futex(2): wakes one that sleeps at `word`. How many: 0 or 1; or -errno."""
    return _result(_syscall(_SYS_FUTEX, pointer(mem, word), _FUTEX_WAKE, 1, pointer(mem, word),
                            pointer(mem, word), 0))
