"""Which queue of a TUN or TAP device gets a packet: a small BPF program, so that a flow stays where it is, and a
flood of SYNs has queues of its own.

Left to itself the kernel moves a flow to the queue through which we last transmitted for it. That is not
where its packets came in when a consumer's worker is another one, and packets change their order at the move.
With a steering program attached, the program alone decides: a hash of addresses and, for TCP and UDP that are
not fragments, of ports. Source and target are joined by exclusive or, so that both directions agree.

Whoever sends SYNs faster than we take them fills a queue, and what the kernel then drops is anybody's. So SYNs have
other queues (what NICs call a SYN filter), and by lot alone an honest peer could still be unlucky for long. So there
are two for SYNs, read in this order: in each second a quarter of all peers, by hash, has its turn. A peer that sends
its SYN again each second (Linux does so four times) has its turn once in four, and then only a fourth of the flood is
before it; the others' queue gets what time is left. Nothing of this is felt while both are read to their end.

For `flows` queues, a flow of queue i has its SYNs in i + flows when it is its turn, otherwise in i + 2 * flows.

Used by `_tuntap`. Where loading BPF is not permitted (CAP_BPF), the kernel's way remains.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import secrets
import struct

__all__ = ["attach"]

_TUNSETSTEERINGEBPF = 0x800454E0
_SYSCALL_BPF = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}
_PROG_LOAD, _SOCKET_FILTER = 5, 1

# -- linux/bpf.h, linux/filter.h: instructions are code, target:4 source:4, jump, value
_SKB_PROTOCOL = 16                      # in struct __sk_buff; as on the wire
_NET = -0x100000                        # SKF_NET_OFF: the network header
_IPV4, _IPV6 = (int.from_bytes(struct.pack("!H", number), "little") for number in (0x0800, 0x86DD))
_LD_W, _LD_H, _LD_B = 0x20, 0x28, 0x30  # r0 = packet[value], network order; beyond the end: the result is 0
_LD_IND_H, _LD_IND_B = 0x48, 0x50       # r0 = packet[source + value]
_LDX_W = 0x61                           # target = (u32) [source + jump]
_SET, _COPY, _AND, _LEFT = 0xB7, 0xBF, 0x57, 0x67
_MUL32, _RIGHT32, _MOD32, _RIGHT, _XOR, _ADD = 0x24, 0x74, 0x94, 0x77, 0xAF, 0x0F
_JUMP, _IF, _UNLESS, _EXIT = 0x05, 0x15, 0x55, 0x95
_HASH = 0x9E3779B1 - (1 << 32)          # 2^32 / golden ratio (Knuth 6.4), as a signed number
_TCP, _UDP = 6, 17
_CALL, _KTIME_GET_NS = 0x85, 5          # r0 = nanoseconds since boot
_TURN_SHIFT, _TURNS = 30, 4             # a turn takes 2^30 ns; turns until it comes again, a power of two
_TCP_FLAGS, _SYN_ACK, _SYN = 13, 0x12, 0x02

_Line = str | tuple[int, int, int, int, int, str]       # a label, or an instruction and the label that it jumps to


def _op(code: int, target: int = 0, source: int = 0, offset: int = 0, value: int = 0, to: str = "") -> _Line:
    return code, target, source, offset, value, to


def _assemble(lines: list[_Line]) -> bytes:
    places: dict[str, int] = {}
    for line in lines:
        if isinstance(line, str):
            places[line] = sum(not isinstance(before, str) for before in lines[:lines.index(line)])
    code = b""
    for line in lines:
        if not isinstance(line, str):
            op, target, source, offset, value, to = line
            jump = places[to] - len(code) // 8 - 1 if to else offset
            code += struct.pack("=BBhi", op, target | source << 4, jump, value)
    return code


def _program(flows: int, apart: bool) -> bytes:
    """The program for so many queues for flows, and twice as many for SYNs if they are kept `apart`.

    r6: the packet, r7: the queue of a SYN, less that of its flow, r8: what is hashed, with a key that nobody knows,
    r9: place of the ports."""
    mix = _op(_XOR, 8, 0)                                       # r8 ^= r0

    def joined(code: int, *places: int) -> list[_Line]:
        return [one for place in places for one in (_op(code, value=_NET + place), mix)]

    def transport() -> list[_Line]:
        return [_op(_IF, 0, value=_TCP, to="tcp"), _op(_IF, 0, value=_UDP, to="ports"), _op(_JUMP, to="end")]

    return _assemble([
        _op(_COPY, 6, 1), _op(_SET, 7), _op(_SET, 8, value=secrets.randbits(31)),
        _op(_LDX_W, 0, 6, _SKB_PROTOCOL),
        _op(_IF, 0, value=_IPV4, to="ipv4"), _op(_IF, 0, value=_IPV6, to="ipv6"),
        _op(_SET, 0), _op(_EXIT),
        "ipv4",
        *joined(_LD_W, 12, 16),
        _op(_LD_H, value=_NET + 6), _op(_AND, 0, value=0x3FFF),     # more fragments | fragment offset
        _op(_UNLESS, 0, to="end"),
        _op(_LD_B, value=_NET), _op(_AND, 0, value=15), _op(_LEFT, 0, value=2), _op(_COPY, 9, 0),
        _op(_LD_B, value=_NET + 9), *transport(),
        "ipv6",
        *joined(_LD_W, *range(8, 40, 4)),
        _op(_SET, 9, value=40),
        _op(_LD_B, value=_NET + 6), *transport(),
        "tcp",
        _op(_LD_IND_B, source=9, value=_NET + _TCP_FLAGS), _op(_AND, 0, value=_SYN_ACK),
        _op(_UNLESS, 0, value=_SYN, to="ports"),
        _op(_SET, 7, value=flows if apart else 0),
        "ports",
        _op(_LD_IND_H, source=9, value=_NET), mix, _op(_LD_IND_H, source=9, value=_NET + 2), mix,
        "end",
        _op(_MUL32, 8, value=_HASH), _op(_RIGHT32, 8, value=16),
        _op(_IF, 7, to="queue"),
        _op(_COPY, 9, 8), _op(_RIGHT32, 9, value=8),
        _op(_CALL, value=_KTIME_GET_NS), _op(_RIGHT, 0, value=_TURN_SHIFT), _op(_XOR, 0, 9),
        _op(_AND, 0, value=_TURNS - 1), _op(_IF, 0, to="queue"),
        _op(_SET, 7, value=2 * flows),
        "queue",
        _op(_COPY, 0, 8), _op(_MOD32, 0, value=flows), _op(_ADD, 0, 7), _op(_EXIT),
    ])


def attach(fd: int, flows: int, apart: bool) -> bool:
    """Lets the program choose the queues of the device of `fd`: of `flows` queues or, SYNs being kept `apart`, of
    three times as many. False if that is not permitted here."""
    number = _SYSCALL_BPF.get(platform.machine())
    if number is None:
        return False
    program, license_ = ctypes.create_string_buffer(_program(flows, apart)), ctypes.create_string_buffer(b"GPL")
    attributes = ctypes.create_string_buffer(struct.pack(
        "=IIQQIIQII", _SOCKET_FILTER, (len(program) - 1) // 8, ctypes.addressof(program),
        ctypes.addressof(license_), 0, 0, 0, 0, 0))
    loaded = ctypes.CDLL(None, use_errno=True).syscall(number, _PROG_LOAD, attributes, len(attributes) - 1)
    if loaded < 0:
        return False
    try:
        fcntl.ioctl(fd, _TUNSETSTEERINGEBPF, struct.pack("i", loaded))
    except OSError:
        return False
    finally:
        os.close(loaded)                # the device keeps the program
    return True
