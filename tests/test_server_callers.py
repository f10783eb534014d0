"""By which names the server may be called, and which web pages may ask it."""

import socket
from contextlib import nullcontext
from ipaddress import ip_address
from pathlib import Path

import pytest
from commands import linux
from server_process import CHAT, TEXT, serving

from tiny_qmoe_mlx.serving import callers, sockets
from tiny_qmoe_mlx.serving.refusal import Refused

pytest_plugins = ["command_fixtures", "server_fixtures"]
OK = {"prompt": "hello", "max_tokens": 2}


CALLERS = {
    "a name pointed at this machine": ({"Host": "evil.example"}, 403),
    "a page of another site": ({"Origin": "https://evil.example"}, 403),
    "a page from a file": ({"Origin": "null"}, 403),
    "a page of this machine": ({"Origin": "http://localhost:3000"}, 200),
    "a path for a name": ({"Host": "localhost/evil.example"}, 403),
    "a name before ours": ({"Host": "evil.example@localhost"}, 403),
    "this machine by name": ({"Host": "localhost:80"}, 200),
}


@pytest.mark.parametrize("what", CALLERS)
def test_who_may_call(live, what):
    headers, status = CALLERS[what]
    answer = live.open("/v1/models", **headers)
    answer.read()
    assert answer.status == status
    assert answer.getheader("Access-Control-Allow-Origin") == (headers.get("Origin") if status == 200 else None)


NAMES = {  # of a host: whether it is ours where we listen on 127.0.0.1, and on 0.0.0.0
    "localhost": (True, True),
    "app.localhost": (True, True),
    "127.0.0.1": (True, True),
    "[::1]": (True, True),
    "box.example": (True, True),  # of --allowed-host
    "BOX.example.": (True, True),
    "192.168.1.7": (False, True),
    "[fe80::1]": (False, True),
    "tower": (False, True),  # as this machine is called
    "tower.lan": (False, True),
    "tower.local": (False, True),
    "evil.example": (False, False),
    "evil.tower.lan": (False, False),
    "127.0.0.1.evil.example": (False, False),
    "0x7f.1": (False, False),
}


@pytest.mark.parametrize("page", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_by_which_names_it_may_be_called(monkeypatch, name, page):
    """A page of its own says where it is from; so does a stranger's whose name leads here."""
    monkeypatch.setattr(callers, "own_names", callers.own_names.__wrapped__)
    monkeypatch.setattr(socket, "gethostname", lambda: "Tower.lan")
    for listening, ours in zip(("127.0.0.1", "0.0.0.0"), NAMES[name], strict=True):
        with nullcontext() if ours else pytest.raises(Refused, match="--allowed-host"):
            host = f"{name}:8080"
            callers.check(host, f"http://{host}" if page else None, listening, ["box.example"], [])


def test_a_name_that_leads_here_is_no_name_of_ours(served):
    """Where other machines may ask too; a client that knows no names is answered."""
    options = ("--host", "0.0.0.0", "--allowed-host", "Box.example", "--context", 512)
    with serving(served, *options) as running:
        host = f"evil.example:{running.port}"
        status, error = running.refused(TEXT, OK, Host=host, Origin=f"http://{host}", Content_Type="text/plain")
        assert (status, error["type"]) == (403, "permission_error") and "--allowed-host" in error["message"]
        for name in ("box.example", f"192.168.1.7:{running.port}"):
            assert running.get("/v1/models", Host=name, Origin=f"http://{name}")["data"]
        assert b" 200 " in running.raw(b"GET /v1/models HTTP/1.0\r\n\r\n")


@linux
def test_an_address_that_belongs_to_one_link():
    """IPv6 has many of the same name: the link's is part of it."""
    rows = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
    found = [(ip_address(int(row[0], 16)), row[5]) for row in rows if row[3] == "20"]
    if not found:
        pytest.skip("needs an IPv6 address of a link")
    with sockets.Server("%".join(map(str, found[0])), 0) as listening:
        assert listening.server_port > 0


def test_a_browser_may_ask_first(live):
    answer = live.open(CHAT, method="OPTIONS", Origin="http://localhost:3000")
    answer.read()
    assert answer.status == 204 and "POST" in answer.getheader("Access-Control-Allow-Methods")
