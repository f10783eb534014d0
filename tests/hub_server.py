"""A small hub: what the Hugging Face hub's client needs of its protocol to read and to write model repositories.

A test module takes the fixtures in with `pytest_plugins = ["hub_server"]`: `hub` is the server, `run` runs a command
and `script` a few lines of Python, both in a process of its own whose hub is that server.
"""

import base64
import hashlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from commands import Result, environment, names, process

WRITER, READER = "hf_writer", "hf_reader"
JSON = {"Content-Type": "application/json"}


class Hub(ThreadingHTTPServer):
    """Serves directories as repositories, takes new files into them, and refuses in the hub's own ways.

    Attributes:
        repositories: id -> directory, or an error code of the hub ("GatedRepo", "RepoNotFound") with its status.
        commit: the hash of every repository's only commit, but for those in `revisions` (id -> hash).
        branches: names by which a repository's only state may also be asked for.
        requests: (method, path) of every request.
        commits: of every commit, the paths it wrote and, with a minus before them, those it took away.
        objects: large files that were sent, by their sha256; a commit may name them.
        failures: patterns of "METHOD path" -> [status of the answer, how often]; status 0 drops the connection.
        broken: a file whose download ends early.
        corrupt: a file that is sent with its last byte flipped.
        whole: a file that is sent whole, whatever part was asked for.
        served: file's name -> bytes of it that were sent.
    """

    daemon_threads = True
    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.repositories: dict[str, Path | tuple[int, str]] = {}
        self.revisions: dict[str, str] = {}
        self.branches = {"main"}
        self.requests: list[tuple[str, str]] = []
        self.commits: list[list[str]] = []
        self.objects: dict[str, bytes] = {}
        self.failures: dict[str, list[int]] = {}
        self.broken: str | None = None
        self.corrupt: str | None = None
        self.whole: str | None = None
        self.served: dict[str, int] = {}
        self.sent = 0  # bytes of all answers

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self) -> list[str]:
        """Names of the files that were read, in order."""
        return [path.rsplit("/", 1)[1] for method, path in self.requests if method == "GET" and "/resolve/" in path]

    def failure(self, request: str) -> int | None:
        """The status with which this request shall fail."""
        for pattern, left in self.failures.items():
            if left[1] > 0 and re.search(pattern, request):
                left[1] -= 1
                return left[0]
        return None


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or an answer's second packet waits for the first one's acknowledgement

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr, where the commands' own words are tested."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        data = self._body()
        self.server.requests.append((self.command, path))
        failure = self.server.failure(f"{self.command} {path}")
        if failure == 0:
            self.close_connection = True
        elif failure is not None:
            self._send(failure, b'{"error": "try again"}')
        elif self.command in ("GET", "HEAD"):
            self._read(path)
        else:
            self._write(path, data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _read(self, path: str) -> None:
        if path == "/api/whoami-v2":
            known = self._token() in (WRITER, READER)
            answer = {"type": "user", "name": "someone"} if known else {"error": "Invalid username or password."}
            self._send(200 if known else 401, json.dumps(answer).encode(), JSON)
            return
        id = r"[\w.-]+/[\w.-]+"
        match = re.fullmatch(rf"/(?:api/models/)?({id}?)(?:/(revision|resolve|tree)/([\w.-]+)/?(.*))?", path)
        found = self.server.repositories.get(match[1], (404, "RepoNotFound")) if match else (404, "EntryNotFound")
        if not isinstance(found, Path):
            self._refuse(*found)
            return
        commit = self.server.revisions.get(match[1], Hub.commit)
        if match[3] not in (None, commit, *self.server.branches):
            self._refuse(404, "RevisionNotFound")
        elif match[2] == "resolve":
            self._send_file(found / match[4], commit)
        elif match[2] == "tree":
            self._send(200, json.dumps([_entry(found / n) for n in names(found)]).encode(), JSON)
        else:
            siblings = [{"rfilename": n} for n in names(found)]
            about = {"id": match[1], "sha": commit, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
            self._send(200, json.dumps(about).encode(), JSON)

    def _write(self, path: str, data: bytes) -> None:
        stored = re.fullmatch(r"/objects/([0-9a-f]{64})", path)
        if stored:
            if hashlib.sha256(data).hexdigest() != stored[1]:  # as of a client that was killed while it sent
                self._send(400, b"BadDigest")
                return
            self.server.objects[stored[1]] = data
            self._send(200, b"")
            return
        if path == "/api/validate-yaml":
            self._send(200, b'{"errors": [], "warnings": []}', JSON)
            return
        if path == "/api/repos/create":
            asked = json.loads(data)
            self._create(f"{asked['organization']}/{asked['name']}")
            return
        match = re.fullmatch(
            r"/(?:api/models/)?([\w.-]+/[\w.-]+?)(?:\.git/info/lfs/objects|/(preupload|commit|paths-info|branch))/(.+)",
            path,
        )
        found = self.server.repositories.get(match[1]) if match else None
        if not isinstance(found, Path):
            self._refuse(404, "RepoNotFound")
        elif match[2] == "paths-info":
            entries = [_entry(found / n) for n in parse_qs(data.decode())["paths"] if (found / n).is_file()]
            self._send(200, json.dumps(entries).encode(), JSON)
        elif self._token() != WRITER:
            self._send(403, b'{"error": "no"}', {**JSON, "X-Error-Message": "you may not write here"})
        else:
            act = {"preupload": self._modes, "commit": self._commit, "branch": self._branch, None: self._batch}
            answer = act[match[2]](found, data, match)
            self._send(200, json.dumps(answer).encode(), JSON)

    def _create(self, id: str) -> None:
        if id in self.server.repositories:
            there = {"error": "You already created this model repo", "url": f"{self.server.address}/{id}"}
            self._send(409, json.dumps(there).encode(), JSON)
        elif self._token() != WRITER or not id.startswith("org/"):
            self._send(403, b'{"error": "no"}', {**JSON, "X-Error-Message": "you may not create this repository"})
        else:
            directory = self.server.root / id.replace("/", "--")
            directory.mkdir()
            (directory / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
            self.server.repositories[id] = directory
            self._send(200, json.dumps({"url": f"{self.server.address}/{id}", "id": id}).encode(), JSON)

    def _branch(self, found: Path, data: bytes, match: re.Match) -> dict:
        self.server.branches.add(match[3])
        return {}

    def _modes(self, found: Path, data: bytes, match: re.Match) -> dict:
        files = []
        for asked in json.loads(data)["files"]:
            file = {"path": asked["path"], "shouldIgnore": False, "uploadMode": "lfs" if _large(asked["path"]) else ""}
            file["uploadMode"] = file["uploadMode"] or "regular"
            if (found / asked["path"]).is_file():
                entry = _entry(found / asked["path"])
                file["oid"] = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
            files.append(file)
        return {"files": files}

    def _batch(self, found: Path, data: bytes, match: re.Match) -> dict:
        objects = []
        for asked in json.loads(data)["objects"]:
            if asked["oid"] not in self.server.objects:
                href = f"{self.server.address}/objects/{asked['oid']}"
                asked = {**asked, "actions": {"upload": {"href": href}}}
            objects.append(asked)
        return {"transfer": "basic", "objects": objects}

    def _commit(self, found: Path, data: bytes, match: re.Match) -> dict:
        done = []
        for line in map(json.loads, data.splitlines()):
            key, value = line["key"], line["value"]
            if key == "file":
                (found / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                (found / value["path"]).write_bytes(self.server.objects[value["oid"]])
            elif key == "deletedFile":
                (found / value["path"]).unlink()
            if key != "header":
                done.append(("-" if key == "deletedFile" else "") + value["path"])
        self.server.commits.append(done)
        new = hashlib.sha1(data).hexdigest()
        self.server.revisions[match[1]] = new
        return {"commitUrl": f"{self.server.address}/{match[1]}/commit/{new}", "commitOid": new, "pullRequestUrl": None}

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b'{"error": "no"}', {"X-Error-Code": code, "X-Error-Message": f"{code} says the server"})

    def _send_file(self, file: Path, commit: str) -> None:
        if not file.is_file():
            self._refuse(404, "EntryNotFound")
            return
        data = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if file.name == self.server.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if file.name == self.server.whole:
            asked = None
        if asked:
            start, stop = int(asked[1]), int(asked[2] or len(data)) + bool(asked[2])
            headers["Content-Range"] = f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"
            data = data[start:stop]
        if self.command == "GET":
            self.server.served[file.name] = self.server.served.get(file.name, 0) + len(data)
        self._send(206 if asked else 200, data, headers, cut=file.name == self.server.broken)

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.server.sent += len(data)
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = cut


def _large(name: str) -> bool:
    return name.endswith(".safetensors")


def _entry(file: Path) -> dict:
    """What the hub's tree says of a file: git's hash, and the sha256 of a large one."""
    data = file.read_bytes()
    entry = {"type": "file", "path": file.name, "size": len(data)}
    entry["oid"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    if _large(file.name):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


@pytest.fixture
def hub(tmp_path) -> Iterator[Hub]:
    root = tmp_path / "hub"
    root.mkdir()
    with Hub(root) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def surroundings(hub, tmp_path) -> dict[str, str]:
    """Environment of a process whose hub is the server here, with a cache of its own and a login that may write."""
    return environment(
        HF_ENDPOINT=hub.address,
        HF_HOME=str(tmp_path / "cache"),
        HF_HUB_OFFLINE="0",
        HF_HUB_DISABLE_XET="1",
        HF_TOKEN=WRITER,
        NO_PROXY="127.0.0.1",
    )


@pytest.fixture
def run(surroundings, tmp_path):
    """Runs a command whose hub is the server here."""

    def run(*argv: object, **changes: str) -> Result:
        return process(*argv, env={**surroundings, **changes}, cwd=tmp_path)

    return run


@pytest.fixture
def script(surroundings, tmp_path):
    """Runs Python whose hub is the server here; an error that people may see is printed as one line."""

    def script(text: str, *argv: object, **changes: str) -> Result:
        command = [sys.executable, "-c", f"{BEFORE}\n{text}\n", *map(str, argv)]
        done = subprocess.run(command, env={**surroundings, **changes}, cwd=tmp_path, capture_output=True, text=True)
        return Result(done.returncode, done.stdout, done.stderr)

    return script


BEFORE = """
import sys
from pathlib import Path
from tiny_qmoe_mlx.hub import client as hub
from tiny_qmoe_mlx import terminal
hub.WAITS = (0.01, 0.01, 0.01)
def said(kind, value, trace):
    if not isinstance(value, (ValueError, OSError)):
        sys.__excepthook__(kind, value, trace)
    else:
        print("error: " + terminal.sentence(value), file=sys.stderr)
sys.excepthook = said
"""
