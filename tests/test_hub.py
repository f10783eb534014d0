"""Models named by a hub id: downloaded through the real huggingface_hub from a small server here."""

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from commands import FILES, SMALL, Result, environment, names, process, refusal

from tiny_qmoe_mlx import native

pytest_plugins = ["command_fixtures"]
pytestmark = pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")
slow = partial(pytest.param, marks=pytest.mark.slow)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves directories as repositories: what `snapshot_download` asks of a hub, and its ways to refuse.

    Attributes:
        repositories: id -> directory, or an error code of the hub ("GatedRepo", "RepoNotFound") with its status.
        requests: (method, path) of every request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Path | tuple[int, str]] = {}
        self.requests: list[tuple[str, str]] = []
        self.broken: str | None = None  # a file whose download ends early

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr, where the commands' own words are tested."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        match = re.fullmatch(r"/(?:api/models/)?([\w-]+/[\w-]+)(?:/(revision|resolve|tree)/([\w.]+)/?(.*))?", path)
        found = self.server.repositories.get(match[1], (404, "RepoNotFound")) if match else (404, "EntryNotFound")
        if not isinstance(found, Path):
            status, code = found
            self._send(
                status, b'{"error": "no"}', {"X-Error-Code": code, "X-Error-Message": f"{code} says the server"}, body
            )
        elif match[3] not in (None, "main", COMMIT):
            self._send(404, b'{"error": "no"}', {"X-Error-Code": "RevisionNotFound"}, body)
        elif match[2] == "resolve":
            self._send_file(found / match[4], body)
        else:
            info = {
                "id": match[1],
                "sha": COMMIT,
                "siblings": [{"rfilename": n} for n in names(found)],
                "private": False,
                "tags": [],
                "downloads": 0,
            }
            tree = [
                {"type": "file", "path": n, "size": (found / n).stat().st_size, "oid": "0" * 40} for n in names(found)
            ]
            self._send(
                200,
                json.dumps(tree if match[2] == "tree" else info).encode(),
                {"Content-Type": "application/json"},
                body,
            )

    def _send_file(self, file: Path, body: bool) -> None:
        if not file.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            return
        data = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        begin = int(start[1]) if start else 0
        self._send(206 if start else 200, data[begin:], headers, body, cut=file.name == self.server.broken)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = cut


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def run(hub, tmp_path):
    """Runs a command whose hub is the server here, with a cache of its own."""

    def run(*argv: object, **changes: str) -> Result:
        own = {
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }
        return process(*argv, env=environment(**{**own, **changes}), cwd=tmp_path)

    return run


def test_convert_downloads_a_checkpoint(hub, run, checkpoint, converted, text, tmp_path):
    repository = shutil.copytree(checkpoint, tmp_path / "repository")
    (repository / "pytorch_model.bin").write_bytes(b"the same weights once more")
    hub.repositories["org/name"] = repository
    done = run("convert", "--hf-path", "org/name", "--mlx-path", "out", "--calibration", text, *SMALL)
    assert done.status == 0 and done.err == "", done
    fetched = {path.rsplit("/", 1)[1] for method, path in hub.requests if method == "GET" and "/resolve/" in path}
    assert fetched == set(names(checkpoint)), "all that is needed and nothing else"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tiny_qmoe"]["source"]["model"] == "org/name"
    for name in FILES[1:5]:
        assert (tmp_path / "out" / name).read_bytes() == (converted / name).read_bytes()


def test_generate_downloads_a_converted_model_once(hub, run, converted):
    hub.repositories["org/converted"] = converted
    line = ("generate", "--model", "org/converted", "--prompt", "x", "--max-tokens", 5, "--json")
    first = run(*line)
    assert first.status == 0 and first.err == "", first
    assert {path.rsplit("/", 1)[1] for method, path in hub.requests if method == "GET" and "/resolve/" in path} == set(
        FILES
    )
    hub.requests.clear()
    for changes in ({}, {"HF_HUB_OFFLINE": "1"}):
        again = run(*line, **changes)
        assert json.loads(again.out)["tokens"] == json.loads(first.out)["tokens"] and again.err == ""
    assert not [path for _, path in hub.requests if "/resolve/" in path]


def test_an_unconverted_checkpoint_on_the_hub_says_how_to_convert_it(hub, run, checkpoint):
    hub.repositories["org/name"] = checkpoint
    sentence = refusal(run("generate", "--model", "org/name", "--prompt", "x"))
    assert "python -m tiny_qmoe_mlx.convert --hf-path org/name --mlx-path name-tiny-qmoe" in sentence


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, "RepoNotFound"), r"org/name .*is no directory here and not on the hub"),
        ((401, "GatedRepo"), r"org/name needs a login and accepted terms on the hub; log in with `hf auth login`"),
        ((500, ""), r"org/name is no directory here, and the hub could not be asked: .*500"),
        slow((403, "GatedRepo"), r"org/name needs a login and accepted terms on the hub"),
        slow((401, "RepoNotFound"), r"org/name .*is no directory here and not on the hub"),
    ],
)
def test_a_hub_that_refuses(hub, run, tmp_path, answer, message):
    hub.repositories["org/name"] = answer
    sentence = refusal(run("convert", "--hf-path", "org/name", "--mlx-path", "out"))
    assert re.search(message, sentence), sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [{"HF_ENDPOINT": "http://127.0.0.1:9"}, slow({"HF_HUB_OFFLINE": "1"}), slow({"HF_ENDPOINT": "http://hub.invalid"})],
)
def test_no_hub(run, changes):
    sentence = refusal(run("generate", "--model", "org/name", "--prompt", "x", **changes))
    assert "org/name is no directory here, and the hub could not be asked: " in sentence


@pytest.mark.slow
def test_a_download_that_breaks_off(hub, run, converted):
    """The hub's client tries again and says so; in the end it is one sentence, and the next run resumes."""
    hub.repositories["org/converted"] = converted
    hub.broken = "model.safetensors"
    failed = run("plan", "--model", "org/converted")
    assert "org/converted is no directory here, and the hub could not be asked" in failed.err.splitlines()[-1]
    assert failed.status == 1 and failed.out == "" and "Traceback" not in failed.err
    hub.broken = None
    assert run("plan", "--model", "org/converted").status == 0
    assert run("verify", "--model", "org/converted").status == 0
