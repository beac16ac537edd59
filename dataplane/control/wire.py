"""The client's end of the control socket: a request out, its reply back, descriptors beside it.

Used by the client library and by the command line. The other end is `control/server.py`; what is
said is in `control/messages.py`. A request that is given up (Ctrl-C, a supervisor that does not
answer) does not put the conversation out of step: its reply is thrown away when it comes.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import msgspec

from dataplane.control import paths
from dataplane.control.messages import MAX_MESSAGE, Attach, Failure, Message, Reply, decode_reply, encode
from dataplane.errors import DataplaneError, LayoutMismatch, Stopped, UnknownDataplane

__all__ = ["Connection", "close_all", "take"]

TIMEOUT = 10.0
"""Seconds after which a supervisor that does not answer is an error."""

WINDOW = 32
"""Requests under way at once in `pipeline`: as many as surely fit in the socket's buffer."""

_MAX_DESCRIPTORS = 8
_DESCRIPTOR = array.array("i")
T = TypeVar("T", bound=Message)


class Connection:
    """One control connection. Everything that its consumer owns ends with it.

    Threads may share it; requests are answered in order.
    """

    def __init__(self, name: str, sock: socket.socket) -> None:
        self.name = name
        self._socket = sock
        self._lock = threading.Lock()
        self._owed = 0
        self.orphans: list[tuple[Reply, list[int]]] = []
        """Replies to requests that were given up, with their descriptors."""

    @classmethod
    def open(cls, name: str, timeout: float = TIMEOUT) -> Connection:
        """Connects to the dataplane `name`. UnknownDataplane if none of that name runs here,
        PermissionError if it may not be spoken to."""
        directories = paths.search_directories()
        if name and "/" not in name and "\0" not in name:
            for directory in directories:
                if sock := _connect(paths.socket_path(directory, name), time.monotonic() + timeout):
                    return cls(name, sock)
        raise UnknownDataplane(_unknown(name, directories))

    def request(self, message: Message, expect: type[T], timeout: float = TIMEOUT) -> tuple[T, list[int]]:
        """The reply and its descriptors, which are the caller's to close. A refusal is raised: the
        OSError of its number, or DataplaneError. Stopped when the dataplane has ended."""
        with self._lock:
            deadline = time.monotonic() + timeout
            self._settle(deadline)
            self._send(message, deadline)
            reply, descriptors = self._receive(deadline)
        return self._expected(message, reply, descriptors, expect), descriptors

    def pipeline(self, messages: Sequence[Message], expect: type[T], timeout: float = TIMEOUT) -> list[T]:
        """Many requests whose replies carry no descriptors, some of them under way at once. Raises
        the first refusal, after the last reply. `timeout` is for each reply."""
        results: list[Reply] = []
        with self._lock:
            self._settle(time.monotonic() + timeout)
            for start in range(0, len(messages), WINDOW):
                window = messages[start:start + WINDOW]
                for message in window:
                    self._send(message, time.monotonic() + timeout)
                for _ in window:
                    reply, descriptors = self._receive(time.monotonic() + timeout)
                    close_all(descriptors)
                    results.append(reply)
        return [self._expected(message, reply, [], expect)
                for message, reply in zip(messages, results, strict=True)]

    def ended(self) -> bool:
        """Whether the other end is gone. Does not block, and takes nothing that another thread
        waits for."""
        descriptor = self._socket.fileno()
        if descriptor < 0:
            return True
        poll = select.poll()
        poll.register(descriptor, select.POLLRDHUP)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Ends the connection, and with it everything that this consumer owned."""
        self._socket.close()
        while self.orphans:
            close_all(self.orphans.pop()[1])

    def forget(self) -> None:
        """After a fork, in the child: drops the descriptor, so that the parent's end is the only
        one. The lock may have been held by a thread that does not exist here."""
        self._lock = threading.Lock()
        self._socket.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def _send(self, message: Message, deadline: float) -> None:
        with _errors(self.name):
            self._socket.settimeout(_left(deadline))
            self._socket.send(encode(message))
        self._owed += 1

    def _receive(self, deadline: float) -> tuple[Reply, list[int]]:
        with _errors(self.name):
            self._socket.settimeout(_left(deadline))
            # Not socket.recv_fds: it drops its flags, and the descriptors would survive an exec.
            data, ancillary, flags, _ = self._socket.recvmsg(
                MAX_MESSAGE, socket.CMSG_LEN(_MAX_DESCRIPTORS * _DESCRIPTOR.itemsize), socket.MSG_CMSG_CLOEXEC)
        descriptors = _descriptors(ancillary)
        if not data:
            raise Stopped(f"dataplane {self.name!r} has ended")
        self._owed -= 1
        try:
            if flags & socket.MSG_TRUNC:    # of descriptors alone (MSG_CTRUNC): see `take`
                raise DataplaneError(f"a reply of dataplane {self.name!r} did not fit")
            return decode_reply(data), descriptors
        except (msgspec.DecodeError, DataplaneError) as error:
            close_all(descriptors)
            if isinstance(error, DataplaneError):
                raise
            raise LayoutMismatch(
                f"dataplane {self.name!r} speaks another version of the control protocol: {error}") from error

    def _settle(self, deadline: float) -> None:
        """Takes the replies of requests that were given up."""
        while self._owed:
            self.orphans.append(self._receive(deadline))

    def _expected(self, message: Message, reply: Reply, descriptors: list[int], expect: type[T]) -> T:
        if isinstance(reply, expect):
            return reply
        close_all(descriptors)
        if isinstance(reply, Failure):
            raise refusal(message, reply)
        raise DataplaneError(
            f"dataplane {self.name!r} answered {type(reply).__name__}, not {expect.__name__}")


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(data[:len(data) - len(data) % found.itemsize])
    return found.tolist()


def refusal(message: Message, reply: Failure) -> Exception:
    """What a refused request raises."""
    if isinstance(message, Attach) and reply.errno == errno.EPROTO:
        return LayoutMismatch(reply.message)
    return OSError(reply.errno, reply.message) if reply.errno else DataplaneError(reply.message)


def take(descriptors: list[int]) -> int:
    """The next descriptor of a reply. OSError(EMFILE) if this process had none free to receive it."""
    if not descriptors:
        raise OSError(errno.EMFILE, "no descriptor is free for what the dataplane sent (RLIMIT_NOFILE)")
    return descriptors.pop(0)


def close_all(descriptors: Sequence[int]) -> None:
    """Closes descriptors that nobody wants."""
    for descriptor in descriptors:
        os.close(descriptor)


def _connect(path: Path, deadline: float) -> socket.socket | None:
    """None where nobody listens: no such file, or left behind by a dataplane that was killed."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        while True:
            sock.settimeout(_left(deadline))
            try:
                sock.connect(str(path))
                return sock
            except BlockingIOError:     # too many others are just connecting
                if time.monotonic() >= deadline:
                    raise DataplaneError(f"the dataplane at {path} does not answer") from None
                time.sleep(0.01)
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        sock.close()
        return None
    except BaseException as error:
        sock.close()
        if isinstance(error, PermissionError):
            raise PermissionError(error.errno, "may not speak to this dataplane", str(path)) from None
        if isinstance(error, OSError) and error.errno is None:
            return None     # a path longer than an address has room for: nobody can listen there
        raise


def _unknown(name: str, directories: Sequence[Path]) -> str:
    """Where it was looked for, and what is there instead."""
    looked = " and ".join(str(directory) for directory in directories)
    running = [found for directory in directories for found in paths.names(directory)
               if _listens(paths.socket_path(directory, found))]
    there = f"running here: {', '.join(running)}" if running else "none is running here"
    return f"no dataplane {name!r} (looked in {looked}; {there})"


def _listens(path: Path) -> bool:
    try:
        sock = _connect(path, time.monotonic() + 0.1)
    except (OSError, DataplaneError):
        return True     # somebody is there, whether or not it speaks to us
    if sock is None:
        return False
    sock.close()
    return True


def _left(deadline: float) -> float:
    """Seconds until then, never 0: that would mean "do not block at all"."""
    return max(deadline - time.monotonic(), 1e-6)


@contextlib.contextmanager
def _errors(name: str) -> Iterator[None]:
    """What goes wrong on the socket, in the user's terms."""
    try:
        yield
    except TimeoutError:
        raise DataplaneError(f"dataplane {name!r} does not answer (is it suspended?)") from None
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF):
            raise Stopped(f"dataplane {name!r} has ended") from None
        raise
