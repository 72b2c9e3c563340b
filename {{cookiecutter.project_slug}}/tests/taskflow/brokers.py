"""A RabbitMQ of the tests' own."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

from kombu import Connection  # type: ignore[attr-defined]

from .servers import Server, free_port

PROGRAMS = (Path("/usr/lib/rabbitmq/bin/rabbitmq-server"),)
"""Debian's own, behind a script that becomes another user."""


def rabbitmq_program() -> str | None:
    return next((str(path) for path in PROGRAMS if path.exists()), None) or shutil.which("rabbitmq-server")


class RabbitServer(Server):
    """As it comes, on a node name and in a directory of its own."""

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    def prepare(self) -> None:
        self._dist = free_port()

    @property
    def user(self) -> dict[str, Any]:
        here = str(self.directory)
        own = {"HOME": here, "RABBITMQ_MNESIA_BASE": f"{here}/data", "RABBITMQ_LOG_BASE": f"{here}/log"}
        own |= {"RABBITMQ_NODENAME": f"taskflow{self._dist}@localhost", "RABBITMQ_DIST_PORT": str(self._dist)}
        own |= {"RABBITMQ_PID_FILE": f"{here}/pid", "RABBITMQ_ENABLED_PLUGINS_FILE": f"{here}/plugins"}
        own |= {"RABBITMQ_NODE_PORT": str(self.port), "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1"}
        return {"env": os.environ | own}

    def command(self, port: int) -> list[str]:
        return [rabbitmq_program() or "rabbitmq-server"]

    def _end(self, number: signal.Signals) -> None:
        """Its program is a script that starts the server, which would outlive its kill."""
        if number == signal.SIGKILL and self.process is not None:
            os.killpg(self.process.pid, number)
        super()._end(number)

    def answers(self) -> bool:
        try:
            client: Any = Connection
            with client(self.url, connect_timeout=2) as connection:
                connection.connect()
                return bool(connection.connected)
        except OSError:
            return False
