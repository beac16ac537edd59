"""Which queue of a TUN or TAP device gets a packet: a small BPF program, so that a flow stays where it is.

Left to itself the kernel moves a flow to the queue through which we last transmitted for it. That is not
where its packets came in when a consumer's worker is another one, and packets change their order at the move.
With a steering program attached, the program alone decides: a hash of addresses and, for TCP and UDP that are
not fragments, of ports. Source and target are joined by exclusive or, so that both directions agree.

Used by `_tuntap` when there are several queues. Where loading BPF is not permitted (CAP_BPF), the kernel's way
remains.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
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
_LD_IND_H = 0x48                        # r0 = packet[source + value]
_HASH = 0x9E3779B1 - (1 << 32)          # 2^32 / golden ratio (Knuth 6.4), as a signed number


def _instruction(code: int, target: int = 0, source: int = 0, jump: int = 0, value: int = 0) -> bytes:
    return struct.pack("=BBhi", code, target | source << 4, jump, value)


def _program() -> bytes:
    """The program. r6: the packet, r8: what is hashed, r9: length of the IPv4 header."""
    mix = _instruction(0xAF, 8, 0)                                  # r8 ^= r0

    def joined(code: int, *places: int) -> list[bytes]:
        return [one for place in places for one in (_instruction(code, value=_NET + place), mix)]

    end = [_instruction(0x24, 8, value=_HASH),                      # (u32) r8 *= _HASH
           _instruction(0x74, 8, value=16),                         # (u32) r8 >>= 16
           _instruction(0xBF, 0, 8), _instruction(0x95)]            # return r8
    ipv6 = [*joined(_LD_W, *range(8, 40, 4)), _instruction(_LD_B, value=_NET + 6),
            _instruction(0x15, 0, jump=1, value=6),                 # TCP: over the next one
            _instruction(0x55, 0, jump=4, value=17),                # not UDP: over the ports
            *joined(_LD_H, 40, 42), *end]
    ports4 = [_instruction(_LD_B, value=_NET),
              _instruction(0x57, 0, value=15), _instruction(0x67, 0, value=2),  # (r0 & 15) << 2
              _instruction(0xBF, 9, 0),
              _instruction(_LD_IND_H, source=9, value=_NET), mix,
              _instruction(_LD_IND_H, source=9, value=_NET + 2), mix]
    ipv4 = [*joined(_LD_W, 12, 16), _instruction(_LD_H, value=_NET + 6),
            _instruction(0x57, 0, value=0x3FFF),                    # more fragments | fragment offset
            _instruction(0x55, 0, jump=3 + len(ports4), value=0),
            _instruction(_LD_B, value=_NET + 9),
            _instruction(0x15, 0, jump=1, value=6),
            _instruction(0x55, 0, jump=len(ports4), value=17),
            *ports4, *end]
    return b"".join([
        _instruction(0xBF, 6, 1), _instruction(0xB7, 8),            # r6 = packet, r8 = 0
        _instruction(0x61, 7, 6, _SKB_PROTOCOL),
        _instruction(0x15, 7, jump=3, value=_IPV4),
        _instruction(0x15, 7, jump=2 + len(ipv4), value=_IPV6),
        _instruction(0xB7, 0), _instruction(0x95),                  # neither: return 0
        *ipv4, *ipv6])


def attach(fd: int) -> bool:
    """Lets the program choose the queues of the device of `fd`. False if that is not permitted here."""
    number = _SYSCALL_BPF.get(platform.machine())
    if number is None:
        return False
    program, license_ = ctypes.create_string_buffer(_program()), ctypes.create_string_buffer(b"GPL")
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
