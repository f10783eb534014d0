"""What a client sends, before it is understood: how much of it, until when, and where a request ends.

One connection carries one request (HTTP/1.0), so nothing can hide behind a request's end; a head that another server
between might read otherwise is refused all the same (RFC 9112, sections 2.2, 3.2, 5.1, 5.2 and 6.3).
"""

import io
import math
import socket
import time
from email.message import Message
from http.client import LineTooLong
from typing import Any

from tiny_qmoe_mlx.serving.refusal import Refused

SILENCE_S = 60.0  # a client that neither sends nor reads for so long is left
HEAD_BYTES, HEAD_S = 128 << 10, 30.0  # of the request line and all headers
BODY_S = 60.0
PIECE = 1 << 15  # bytes that a client has to take within SILENCE_S
LARGE_S, LARGE_RATE = 10.0, 80_000  # of a large body: seconds, and bytes that come for each one more


class Received(io.RawIOBase):
    """A connection's bytes, up to a time and a number: a client that sends one a minute is left too.

    Reading raises TimeoutError past the time, LineTooLong past the number. ended: the client sends no more.
    """

    def __init__(self, connection: socket.socket):
        self._connection, self.ended = connection, False
        self.allow(HEAD_S, HEAD_BYTES)

    def allow(self, seconds: float, size: int, rate: float = math.inf) -> None:
        """From now on, for so long and so many bytes, each of which gives more time where there is a rate a second."""
        self._end, self._left, self._rate = time.monotonic() + seconds, size, rate

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any, /) -> int:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request did not come in time")
        self._connection.settimeout(min(SILENCE_S, left))
        try:
            size = self._connection.recv_into(into)
        finally:
            self._connection.settimeout(SILENCE_S)  # of what is written meanwhile
        self._end, self._left, self.ended = self._end + size / self._rate, self._left - size, size == 0
        if self._left < 0:
            raise LineTooLong("the request")
        return size


class Sent(io.BufferedIOBase):
    """A connection's way out, in pieces: a socket's timeout is for all that it is given at once, and a large answer may
    take a slow client longer than that."""

    def __init__(self, connection: socket.socket):
        self._connection = connection

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        for start in range(0, len(data), PIECE):
            self._connection.sendall(data[start : start + PIECE])
        return len(data)


class Head(io.BufferedReader):
    """A connection's lines. odd: one of them goes on from the one before, or holds what the library would take for the
    end of a line, or of a text (RFC 9112, sections 2.2 and 5.2; RFC 9110, section 5.5)."""

    odd = False

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        inside = line.removesuffix(b"\n").removesuffix(b"\r")
        self.odd |= line.startswith((b" ", b"\t")) or b"\r" in inside or b"\0" in inside
        return line


def check_head(headers: Message, version: str, odd: bool) -> None:
    """Refuse a head that two servers could read in two ways.

    Args:
        headers: of the request.
        version: "HTTP/1.1" or another.
        odd: whether some line is, as `Head` says.

    Raises:
        Refused: with what is wrong.
    """
    if odd or headers.defects or headers.get_payload():
        raise Refused(400, "each header should be a line of a name, a colon and a value; one is not.")
    for name in ("Host", "Content-Length", "Transfer-Encoding"):
        if len(headers.get_all(name, [])) > 1:
            raise Refused(400, f"the header {name} should be there once at most.")
    if version >= "HTTP/1.1" and "Host" not in headers:
        raise Refused(400, "a request of HTTP/1.1 needs the header Host.")
    if "Transfer-Encoding" in headers:
        both = "Content-Length" in headers
        raise Refused(400 if both else 411, "a request should come with Content-Length, without Transfer-Encoding.")


def body_length(headers: Message, needed: bool) -> int:
    """Bytes of the body that are to come.

    Raises:
        Refused: it is no number, or it is needed and not there.
    """
    text = headers.get("Content-Length")
    if text is None and needed:
        raise Refused(411, "a request needs the header Content-Length.")
    if not (text or "0").isdecimal() or len(text or "") > 18:
        raise Refused(400, f"Content-Length should be a number of bytes, received {str(text)[:40]!r}.")
    return int(text or 0)
