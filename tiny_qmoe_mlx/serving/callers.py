"""Who may ask, by the names that a request gives: the host that it was sent to, and the web page that sent it.

A stranger's web page can be given a name that leads to this machine (DNS rebinding): it is then a page of this very
server for the browser, and only the name tells. An address written as numbers cannot be given like that.
"""

import functools
import socket
from ipaddress import ip_address
from urllib.parse import urlsplit

from tiny_qmoe_mlx.serving.refusal import Refused

NO_HOST = frozenset("/?#@\\ \t")  # what may end a host's name in a URL, or come before it: a name and a port have none


def check(host: str, origin: str | None, listening: str, hosts: list[str], origins: list[str]) -> None:
    """Refuse what was sent to a name that is none of ours, or by a page that may not ask.

    Args:
        host, origin: the headers; an empty host is that of a client older than HTTP/1.1, which is no browser.
        listening: of --host: where it is local, other machines' addresses are not ours.
        hosts, origins: of --allowed-host and --allowed-origins.

    Raises:
        Refused: with the option that would let it in.
    """
    if NO_HOST.intersection(host) or host and not is_ours(host_of(f"//{host}").removesuffix("."), listening, hosts):
        raise Refused(403, f"this server was called {host[:80]!r}, which is no name of its own; see --allowed-host.")
    same = origin is not None and origin.partition("://")[2] == host
    if origin is not None and not (same or is_local(host_of(origin)) or {"*", origin}.intersection(origins)):
        raise Refused(403, f"web pages of {origin[:80]} may not ask this server; see --allowed-origins.")


def is_ours(name: str, listening: str, hosts: list[str]) -> bool:
    """Whether a name means this machine."""
    if is_local(name) or name in hosts:
        return True
    return not is_local(listening) and (is_address(name) or name in (listening.lower(), *own_names()))


@functools.cache
def own_names() -> tuple[str, ...]:
    """What this machine calls itself, without asking the network."""
    whole = socket.gethostname().lower()
    first = whole.partition(".")[0]
    return (whole, first, f"{first}.local")


def host_of(url: str) -> str:
    """The host's name in a URL, in small letters; nothing where there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def is_address(host: str) -> bool:
    """Whether a host is written as an IP address."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def is_local(host: str) -> bool:
    """Whether a host's name means this machine and no other."""
    if is_address(host):
        return ip_address(host).is_loopback
    return host == "localhost" or host.endswith(".localhost")
