"""Connections: bound before a model is loaded, a thread for each, not more of them than the machine can hold."""

import errno
import json
import logging
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from http.server import ThreadingHTTPServer
from typing import Any

from tiny_qmoe_mlx.serving.refusal import Refused

CONNECTIONS = 512
LEAVING, LEAVING_S = 128, 2.0  # connections turned away that may still read why, and for how long
log = logging.getLogger("tiny_qmoe_mlx.server")


class Server(ThreadingHTTPServer):
    """The HTTP server; it answers once `serve_forever` runs."""

    allow_reuse_port = False  # a port that another server has is in use
    request_queue_size = 128

    def __init__(self, host: str, port: int):
        """
        Raises:
            ValueError: the host is none of this machine's; the port is in use, or may not be used.
        """
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        self._leaving: deque[tuple[float, socket.socket]] = deque()
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            self.address_family, _, _, _, address = found[0]
            super().__init__(address, None)  # type: ignore[arg-type]  # of IPv6 with the link's number
        except (OSError, UnicodeError) as error:
            raise ValueError(_why(host, port, error)) from error

    def server_bind(self) -> None:
        """As the library's, which would ask the network for this machine's name."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self._turn_away(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def _turn_away(self, request: socket.socket) -> None:
        body = json.dumps(Refused(503, f"{CONNECTIONS} connections are open; try again.", "server_busy").body)
        head = f"HTTP/1.0 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        request.settimeout(0)
        with suppress(OSError):
            request.send(f"{head}\r\nRetry-After: 5\r\n\r\n{body}".encode())
            request.shutdown(socket.SHUT_WR)
        # closed now, with its request unread, the connection would be reset under the answer
        self._leaving.append((time.monotonic() + LEAVING_S, request))

    def service_actions(self) -> None:
        """Between connections: close those that have had time to read why they were turned away."""
        while self._leaving and (len(self._leaving) > LEAVING or self._leaving[0][0] < time.monotonic()):
            self.close_request(self._leaving.popleft()[1])

    def server_close(self) -> None:
        super().server_close()
        for _, request in self._leaving:
            self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """What a connection's thread could not say to its client."""
        log.exception("a connection failed")


def _why(host: str, port: int, error: Exception) -> str:
    """A sentence on why there is no listening there."""
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return f"[server] port {port} of {host} should be free, another program listens there; give another --port."
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM):
        return f"[server] port {port} may not be used by this account; give a --port above 1023."
    reason = getattr(error, "strerror", None) or str(error)
    return f"[server] --host should be an address of this machine, received {host}: {reason}."
