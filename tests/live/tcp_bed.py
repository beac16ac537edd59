"""Where TCP is tested: a dataplane on a TUN or on one end of a veth pair, and kernel sockets as its peers.

    with world("tun", "connections = 64") as w:
        server = w.consumer(serve_echo, 7000)       # a process with an attachment of its own
        w.peer.call(kernel_client, ...)             # a process in the peer's namespace

Both ends move the same streams: `stream(seed, size)` gives the bytes of one in pieces, `exchange` sends one
and receives the other at the same time, through whatever has the methods of a socket.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import dataplane
from tests.dataplane_fixture import Running, running
from tests.netns import Forked, Namespace, veth
from tests.relay import Relay

OURS = {4: "10.77.0.1", 6: "fd77::1"}
KERNELS = {4: "10.77.0.2", 6: "fd77::2"}
FAR = {4: "10.78.0.2", 6: "fd78::2"}        # behind the router of a routed world
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
CORES = sorted(os.sched_getaffinity(0))[:2]
WATCHDOG = 60.0
PIECE = 1 << 18


@dataclass
class World:
    """The dataplane, and the namespace in which its kernel peers are. `device` is the peer's interface, `near`
    the one (and its namespace) through which packets leave for the peer; `link` what is in between, if routed."""

    process: Running
    peer: Namespace
    device: str
    near: tuple[Namespace, str]
    kind: str
    kernels: dict[int, str]
    link: Relay | None = None

    @property
    def name(self) -> str:
        return self.process.name

    def consumer(self, function: Callable[..., Any], *args: Any) -> Forked:
        """Runs function(attachment, ...) in a process of its own."""
        def attached() -> Any:
            with dataplane.attach(self.name) as dp:
                return function(dp, *args)

        return Forked(attached)


def config(netif: str, more: str = "", workers: int = 1) -> str:
    addresses = [f"{OURS[4]}/24", f"{OURS[6]}/64"]
    return f"""
[rx]
cores = {CORES[:workers]}
{more}
[[netif]]
{netif}
addresses = {json.dumps(addresses)}
"""


@contextlib.contextmanager
def world(kind: str, more: str = "", routed: bool = False, workers: int = 1) -> Iterator[World]:
    """`kind`: tun or af_packet. `routed`: the peer is one hop away, behind a link that can be impaired."""
    with contextlib.ExitStack() as stack:
        here = stack.enter_context(Namespace())
        peer = stack.enter_context(Namespace()) if routed or kind == "af_packet" else here
        theirs = [f"{KERNELS[4]}/24", f"{KERNELS[6]}/64"]
        gateway = ""
        if routed and kind == "af_packet":
            # A router's questions for the neighbours of others come from its link-local address.
            router = stack.enter_context(Namespace())
            _, inner = veth(router, here, [*theirs, "fe80::1/64"])
        elif kind == "af_packet":
            router = here
            device, inner = veth(peer, here, theirs)
        else:
            router = here
        netif = 'kind = "tun"\ndevice = "dp0"' if kind == "tun" else f'kind = "af_packet"\ndevice = "{inner}"'
        if routed:
            gateway = f"\ngateway = {json.dumps(list(KERNELS.values()))}"
        text = config(netif + gateway, more, workers)
        process = stack.enter_context(running(text, prefix=["ip", "netns", "exec", here.name]))
        near, kernels, link = (here, "dp0" if kind == "tun" else inner), KERNELS, None
        if routed:
            link = stack.enter_context(_link(router, peer))
            device, near, kernels = link.devices[1], (router, link.devices[0]), FAR
        elif kind == "tun":
            device = "dp0"
        yield World(process, peer, device, near, kind, kernels, link)
        if process.process.poll() is None:
            process.stop()


def _link(router: Namespace, peer: Namespace) -> Relay:
    """Puts the peer one hop behind the router."""
    router.run(["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding"])
    link = Relay(router, peer, ["10.78.0.1/24", "fd78::1/64"], [f"{FAR[4]}/24", f"{FAR[6]}/64"])
    peer.ip("route", "add", "default", "via", "10.78.0.1")
    peer.ip("-6", "route", "add", "default", "via", "fd78::1")
    return link


# -- streams --------------------------------------------------------------------------------


def stream(seed: int, size: int) -> Iterator[memoryview]:
    """The bytes of a stream, in pieces. No two pieces are alike, so that one in the wrong place shows."""
    base = memoryview(random.Random(seed).randbytes(2 * PIECE))
    number = 0
    while size > 0:
        start = number * 7919 % PIECE
        piece = min(PIECE, size)
        yield base[start:start + piece]
        size -= piece
        number += 1


def digest(seed: int, size: int) -> str:
    """SHA-256 of a stream."""
    sha = hashlib.sha256()
    for piece in stream(seed, size):
        sha.update(piece)
    return sha.hexdigest()


def send_stream(sock: Any, seed: int, size: int) -> None:
    """Sends a stream, and then the end of it."""
    for piece in stream(seed, size):
        sock.sendall(piece)
    sock.shutdown(socket.SHUT_WR)


def receive_stream(sock: Any) -> tuple[int, str]:
    """Receives to the end: bytes and SHA-256."""
    sha, total = hashlib.sha256(), 0
    room = bytearray(1 << 20)
    view = memoryview(room)
    while size := sock.recv_into(room):
        sha.update(view[:size])
        total += size
    return total, sha.hexdigest()


def exchange(sock: Any, seed: int, size: int) -> tuple[int, str]:
    """Sends a stream while it receives another; what it received."""
    failures: list[BaseException] = []

    def send() -> None:
        try:
            send_stream(sock, seed, size)
        except BaseException as error:
            failures.append(error)

    sender = threading.Thread(target=send)
    sender.start()
    received = receive_stream(sock)
    sender.join()
    if failures:
        raise failures[0]
    return received


# -- kernel peers, in their namespace -----------------------------------------------------------------------------


def kernel_connect(family: int, port: int, timeout: float = WATCHDOG, **options: int) -> socket.socket:
    """A kernel socket connected to the dataplane. Options: receive buffer etc. by name of SOL_SOCKET's."""
    sock = socket.socket(FAMILIES[family], socket.SOCK_STREAM)
    for name, value in options.items():
        sock.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    sock.settimeout(timeout)
    sock.connect((OURS[family], port))
    return sock


def kernel_listener(family: int, port: int, backlog: int = 1024) -> socket.socket:
    """A kernel socket that listens on all addresses."""
    sock = socket.socket(FAMILIES[family], socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("0.0.0.0" if family == 4 else "::", port))
    sock.listen(backlog)
    sock.settimeout(WATCHDOG)
    return sock


def wait_for(condition: Callable[[], Any], what: str, timeout: float = WATCHDOG) -> Any:
    """Until the condition holds; what it returned."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.01)
    return value


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """(reading, writing)."""
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


def allow_descriptors(count: int) -> None:
    """Lets this process have so many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, max(hard, count)))
