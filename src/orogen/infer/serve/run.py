"""A server from its start to its end."""

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from orogen.config.checks import ConfigError
from orogen.config.streams import say
from orogen.infer.service import Service

INTERRUPTED = 128 + signal.SIGINT  # as a shell has it for Ctrl-C


class DrainingServer(uvicorn.Server):
    """Drains at the first SIGTERM or Ctrl-C: requests that run may end, new ones are refused with 503, and /health says
    so. Ends at the second."""

    def __init__(
        self, config: uvicorn.Config, service: Service, drain_seconds: float, ready: Callable[[str, int], None]
    ) -> None:
        super().__init__(config)
        self._service, self._drain_seconds, self._ready = service, drain_seconds, ready
        self.by: int | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """In place of uvicorn's own, which stops to listen at once, and raises the signal again at the end."""
        if self.by is not None:
            self.should_exit = self.force_exit = True
            return
        self.by = sig
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        say(f"orogen: draining {self._service.open} requests, for at most {self._drain_seconds:g} s")
        self._draining = self._loop.create_task(self._drain())

    async def _drain(self) -> None:
        await self._service.drain(self._drain_seconds)
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; then the server listens, which it says."""
        await super().startup(sockets)
        for bound in sockets or []:
            host, port = bound.getsockname()[:2]
            say(f"orogen: serving on http://{f'[{host}]' if ':' in host else host}:{port}")
            self._ready(host, port)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0: any that is free. Raises ConfigError, also for a port that is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise ConfigError(f"--host {host} --port {port}: {error}; expected an address to listen on") from None
    return bound


def make_server(
    app: Starlette, service: Service, *, drain_seconds: float, ready: Callable[[str, int], None]
) -> DrainingServer:
    """The server of an application. ready: called with the host and port once it listens."""
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    # What is left when the drain is over has been cancelled, and ends within a moment.
    config = uvicorn.Config(
        app, log_config=None, access_log=False, timeout_graceful_shutdown=5, lifespan="on", timeout_keep_alive=30,
        server_header=False,
    )  # fmt: skip
    return DrainingServer(config, service, drain_seconds, ready)


def run(server: DrainingServer, bound: socket.socket) -> int:
    """Serves on a bound socket until SIGTERM or Ctrl-C. Returns the exit status: 0, or 130 after Ctrl-C."""
    server.run(sockets=[bound])
    return INTERRUPTED if server.by == signal.SIGINT else 0
