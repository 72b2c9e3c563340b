"""Processes of one host that share a file tell each other that there is work.

Owns a folder of datagram sockets, one for each process that listens. Nothing is lost with a datagram: the poll finds
the same work a little later. Where there are no such sockets, nobody is told.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

from ..loops import Throttle

ANNOUNCE_INTERVAL = 0.005
"""Seconds between two announcements at least."""
_numbers = count(1)


class Neighbours:
    def __init__(self, file: str) -> None:
        name = hashlib.sha256(os.path.realpath(file).encode()).hexdigest()[:16]
        user = os.getuid() if hasattr(os, "getuid") else 0
        self._folder = Path(tempfile.gettempdir(), f"taskflow-{user}-{name}")
        self._mine: Path | None = None
        self._socket: socket.socket | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._announcing = Throttle(ANNOUNCE_INTERVAL)

    def listen(self, wake: Callable[[], None]) -> None:
        """Calls `wake` on the running event loop whenever another process announces something."""
        self.close()
        with suppress(OSError, AttributeError, NotImplementedError):
            self._folder.mkdir(mode=0o700, exist_ok=True)
            if self._folder.stat().st_uid != os.getuid():  # somebody else's, who may not hear of our work
                return
            self._mine = self._folder / f"{os.getpid()}-{next(_numbers)}"
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
            self._socket.bind(str(self._mine))
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._socket.fileno(), self._hear, wake)

    def _hear(self, wake: Callable[[], None]) -> None:
        with suppress(OSError):
            while self._socket is not None and self._socket.recv(1):
                wake()

    def announce(self) -> None:
        if self._socket is None or not self._announcing.permits():
            return
        with suppress(OSError):
            for place in self._folder.iterdir():
                if place != self._mine:
                    self._tell(self._socket, place)

    def _tell(self, sender: socket.socket, place: Path) -> None:
        try:
            sender.sendto(b"!", str(place))
        except BlockingIOError:  # it has enough to read
            pass
        except (ConnectionRefusedError, FileNotFoundError):  # its process has died
            place.unlink(missing_ok=True)

    def close(self) -> None:
        if self._socket is not None:
            with suppress(OSError, RuntimeError, ValueError):
                if self._loop is not None and not self._loop.is_closed():
                    self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
        if self._mine is not None:
            self._mine.unlink(missing_ok=True)
            with suppress(OSError):
                self._folder.rmdir()  # where nobody listens any more
            self._mine = None
