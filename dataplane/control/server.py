"""The control socket's server: connections, credentials, strict decoding, and limits on all of it.

Called by the supervisor's loop. Whoever connects is a `Peer`, identified by the kernel (SO_PEERCRED), not by
what it says. A peer sends one request at a time and gets exactly one reply to each; what is not a request, or
is too long, or comes from somebody who does not take the replies, closes the connection. What requests mean
is the business of the `Service`; a peer's end is reported to it exactly once, whatever caused it.

Bounded: connections in total and per user, and one request in progress on each of them.
"""

from __future__ import annotations

import array
import errno
import os
import resource
import socket
import struct
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from dataplane.control import messages
from dataplane.control.loop import Loop
from dataplane.errors import DataplaneError

MAX_CONNECTIONS = 8192
MAX_PER_STRANGER = 256      # connections of one user who is neither root nor the owner
SPARE = 32                  # descriptors that no request is given: a worker's replacement needs some
_BACKLOG = 256
_ACCEPTS = 32               # connections taken in one turn of the loop

Answer = tuple[messages.Reply, Sequence[int]]   # the reply, and descriptors that go with it


def demand_descriptors(spare: int = SPARE) -> None:
    """OSError(EMFILE) unless this process may open `spare` more."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    probe = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)      # gets the lowest number that is free
    os.close(probe)
    if most != resource.RLIM_INFINITY and probe > most - spare:
        raise OSError(errno.EMFILE, f"the dataplane has no descriptors left (RLIMIT_NOFILE is {most})")


class Peer:
    """One connection. `pid`, `uid` and `gid` are those of the process that connected."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        form = struct.Struct("3i")
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, form.size)
        self.pid, uid, gid = form.unpack(credentials)
        self.uid, self.gid = uid & 0xFFFFFFFF, gid & 0xFFFFFFFF
        self.open = True

    def send(self, reply: messages.Reply, descriptors: Sequence[int] = ()) -> bool:
        """Send one reply; False when the peer is gone or does not take its replies."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        try:
            data = [messages.encode(reply)]
            self.socket.sendmsg(data, rights if descriptors else [], socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True


class Service(Protocol):
    """What serves the requests. Exceptions become the reply: OSError and DataplaneError as they are."""

    async def serve(self, peer: Peer, request: messages.Request) -> Answer:
        """Do what `request` asks for."""

    def gone(self, peer: Peer) -> None:
        """`peer` has disconnected. Not called while one of its requests is being served."""


class Server:
    """Listens at `path`, which must not exist; everybody may connect. `close` removes it."""

    def __init__(self, loop: Loop, path: Path, service: Service) -> None:
        self._loop, self._service, self._path = loop, service, path
        self._owner = os.geteuid()
        self.peers: set[Peer] = set()
        self._users: Counter[int] = Counter()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            self._listener.bind(os.fspath(path))
            path.chmod(0o666)
            self._listener.listen(_BACKLOG)
        except BaseException as error:
            self._listener.close()
            if isinstance(error, OSError) and error.errno is None:      # longer than sun_path, 107 bytes
                raise DataplaneError(f"{path}: {error}; DATAPLANE_RUNTIME_DIR chooses another directory") from None
            raise
        self._listen()

    def close(self) -> None:
        """Hang up on everybody, without telling the service, and stop listening."""
        self._loop.watch(self._listener.fileno())
        self._listener.close()
        self._path.unlink(missing_ok=True)
        for peer in self.peers:
            if peer.open:
                peer.open = False
                self._loop.watch(peer.socket.fileno())
                peer.socket.close()
        self.peers.clear()

    def close_descriptors(self) -> None:
        """In a forked child: close its copies of all sockets, so that only the parent's keep them open."""
        self._listener.close()
        for peer in self.peers:
            peer.socket.close()

    # -- connections -----------------------------------------------------------------------------------------

    def _listen(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.watch(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(_ACCEPTS):
            try:
                connection, _address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError:     # out of descriptors: the others go on, new ones wait
                self._loop.watch(self._listener.fileno())
                self._loop.later(0.1, self._listen)
                return
            connection.setblocking(False)
            self._admit(Peer(connection))

    def _admit(self, peer: Peer) -> None:
        limit = MAX_CONNECTIONS if peer.uid in (0, self._owner) else MAX_PER_STRANGER
        if self._users[peer.uid] >= limit or len(self.peers) >= MAX_CONNECTIONS:
            self._refuse(peer, errno.EAGAIN, "too many connections to this dataplane")
            return
        try:
            demand_descriptors(SPARE // 2)      # who only looks is the last to be refused
        except OSError as error:
            self._refuse(peer, errno.EMFILE, error.strerror or str(error))
            return
        self.peers.add(peer)
        self._users[peer.uid] += 1
        self._await_request(peer)

    def _refuse(self, peer: Peer, number: int, why: str) -> None:
        peer.send(messages.Failure(number, why))
        peer.socket.close()

    def _await_request(self, peer: Peer) -> None:
        self._loop.watch(peer.socket.fileno(), lambda: self._receive(peer))

    def _drop(self, peer: Peer) -> None:
        peer.open = False
        self._loop.watch(peer.socket.fileno())
        peer.socket.close()
        self.peers.discard(peer)
        self._users[peer.uid] -= 1
        self._service.gone(peer)

    # -- requests --------------------------------------------------------------------------------------------

    def _receive(self, peer: Peer) -> None:
        try:
            # Without room for ancillary data: descriptors that somebody sends us are closed by the kernel.
            data, _, flags, _ = peer.socket.recvmsg(messages.MAX_MESSAGE)
        except BlockingIOError:
            return
        except OSError:
            data, flags = b"", 0
        if not data:
            self._drop(peer)
            return
        try:
            if flags & socket.MSG_TRUNC:
                raise msgspec.DecodeError(f"longer than {messages.MAX_MESSAGE} bytes")
            request = messages.decode_request(data)
        except msgspec.DecodeError as error:
            peer.send(messages.Failure(errno.EBADMSG, f"not a request: {error}"))
            self._drop(peer)
            return
        self._loop.watch(peer.socket.fileno())     # the next request waits until this one is answered
        self._loop.spawn(self._answer(peer, request))

    async def _answer(self, peer: Peer, request: messages.Request) -> None:
        descriptors: Sequence[int] = ()
        reply: messages.Reply
        try:
            reply, descriptors = await self._service.serve(peer, request)
        except OSError as error:
            reply = messages.Failure(error.errno or errno.EIO, error.strerror or str(error))
        except DataplaneError as error:
            reply = messages.Failure(0, str(error))
        except Exception:       # a mistake of ours must not end what others use
            traceback.print_exc(file=sys.stderr)
            reply = messages.Failure(errno.EIO, "internal error of the dataplane; see its standard error")
        if not peer.open:       # the server was closed meanwhile
            return
        if peer.send(reply, descriptors):
            self._await_request(peer)
        else:
            self._drop(peer)
