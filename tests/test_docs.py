"""Every command and every piece of Python in README and docs runs as it is printed.

They run in a folder where `Qwen/Qwen3-30B-A3B` and `switch-base-128` are tiny checkpoints, in the order in which
they stand. Those of benchmarks, of make and of pytest are held against the options, targets and files that there are;
their own tests run them.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from functools import lru_cache
from pathlib import Path

import api_reference
import pytest
import switch_models
import tiny_models
from chat_model import TEMPLATE
from commands import environment

from tiny_qmoe_mlx import native

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
STARTS = ("python ", "make ", "pytest ", "pip ", "mlx_lm.", "TINY_QMOE_MEMORY=", "PYTHON=", ".ci/")
SCRIPTS = re.compile(r"python ((?:benchmarks|examples)/\S+\.py)")
SERVERS = re.compile(r"tiny_qmoe_mlx\.server|mlx_lm\.server")
RANDOM_MODEL = {"num_hidden_layers": 2, "hidden_size": 256, "moe_intermediate_size": 128}


def printed(page: Path) -> list[str]:
    """The commands of a page, from indented and fenced blocks and from inline code, comments off."""
    text = page.read_text()
    blocks = re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"^ {4}(\S.*)$", text, re.M)
    lines += [word for word in re.findall(r"`([^`\n]+)`", text) if " " in word]
    lines = [re.split(r"\s+#\s", line)[0].strip() for line in lines]
    return list(dict.fromkeys(line for line in lines if line.startswith(STARTS)))


COMMANDS = [(page.name, line) for page in PAGES for line in printed(page)]
OURS = list(dict.fromkeys(line for _, line in COMMANDS if re.search(r"tiny_qmoe_mlx\.|mlx_lm\.", line)))


def test_pages_have_commands_and_links_lead_somewhere():
    assert len(OURS) >= 8 and len(COMMANDS) > 25
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_command_is_of_a_kind_that_is_checked():
    kinds = r"tiny_qmoe_mlx\.|mlx_lm\.|make |pytest |pip |\.ci/run|python (benchmarks|examples|tests)/|PYTHON=|"
    kinds += r"python -m abuse\."
    for page, line in COMMANDS:
        assert re.search(kinds, line), f"{page}: {line}"


def test_the_reference_has_todays_docstrings():
    """Signatures aside, whose types Python's versions print in different words."""
    pages = api_reference.PAGE.read_text(), api_reference.page()
    written, made = (re.sub(r"(?m)^\w+\(.*$", "", page) for page in pages)
    assert written == made, "run python tests/api_reference.py"


@pytest.mark.parametrize("line", sorted({line for _, line in COMMANDS if "make " in line}))
def test_make_knows_the_target(line):
    if shutil.which("make") is None:
        pytest.skip("no make here")
    words = [word for word in shlex.split(line) if "=" not in word]
    done = subprocess.run([*words, "-n"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("line", sorted({line for _, line in COMMANDS if re.search(r"(^|-m )pytest ", line)}))
def test_pytest_finds_the_files(line):
    for word in shlex.split(line):
        if word.startswith("tests/"):
            assert list(ROOT.glob(word.split("::")[0])), word


@pytest.mark.parametrize("line", sorted({line for _, line in COMMANDS if "-m abuse." in line}))
def test_what_tries_to_break_promises_is_there(line):
    words = shlex.split(line)
    module = words[words.index("-m") + 1]
    assert (ROOT / "tests" / f"{module.replace('.', '/')}.py").is_file(), module


@lru_cache
def options_of(script: str) -> str:
    command = [sys.executable, script, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("line", sorted({line for _, line in COMMANDS if SCRIPTS.search(line)}))
def test_scripts_have_the_options(line):
    pytest.importorskip("matplotlib")
    script = SCRIPTS.search(line)[1]
    said = options_of(script)
    for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", line):
        assert option in said, f"{script} has no {option}"


def place(root: Path) -> Path:
    """A folder in which the printed names exist."""
    source = tiny_models.make_checkpoint(root / "Qwen/Qwen3-30B-A3B", "qwen3_moe", **RANDOM_MODEL)
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "chat_template": TEMPLATE}))
    switch_models.write(root / "switch-base-128")
    (root / "held-out.txt").write_text("the river runs under the old stone bridge in the rain " * 120)
    return root


def words_of(line: str) -> tuple[list[str], dict[str, str]]:
    """A printed command for subprocess: this interpreter, and the variables set before it."""
    words, variables = shlex.split(line), {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    if words[0].startswith("mlx_lm."):
        words[:1] = ["python", "-m", "mlx_lm", words[0].removeprefix("mlx_lm.")]
    return [sys.executable if words[0] == "python" else words[0], *words[1:]], variables


def run(line: str, folder: Path) -> None:
    """Run a command to its end; a server until it answers, a chat until its input ends."""
    words, variables = words_of(line.replace("DIR_OR_HUB_ID", "qwen3-2bit").replace(" DIR", " qwen3-2bit"))
    env = environment(**variables, HF_HUB_OFFLINE="1")
    if SERVERS.search(line):
        return serve(words, folder, env)
    if "generate" in line and "--max-tokens" not in line:
        words += ["--max-tokens", "8"]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=300, input="hello\n")
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return None


def serve(words: list[str], folder: Path, env: dict[str, str]) -> None:
    port = 20000 + os.getpid() % 20000
    if "--port" in words:
        at = words.index("--port")
        del words[at : at + 2]
    child = subprocess.Popen([*words, "--port", str(port)], cwd=folder, env=env, stderr=subprocess.PIPE)
    try:
        for _ in range(600):
            assert child.poll() is None, child.stderr.read().decode()[-2000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as answer:
                    assert answer.status == 200
                    return
            except OSError:
                time.sleep(0.1)
        pytest.fail("the server did not answer within a minute")
    finally:
        child.send_signal(signal.SIGINT)
        try:
            child.wait(30)
        finally:
            child.kill()
            child.stderr.close()


@pytest.mark.slow
@pytest.mark.skipif(not native.available(), reason="conversion needs the C++ library")
def test_commands_run_as_printed(tmp_path):
    folder = place(tmp_path)
    first = [line for line in OURS if ".convert" in line and "--hf-path" in line]
    for line in [*first, *(line for line in OURS if line not in first)]:
        run(line, folder)
    for page in PAGES:
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
            done = subprocess.run(
                [sys.executable, "-c", block],
                cwd=folder,
                env=environment(),
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert done.returncode == 0, f"{page.name}\n{block}\n{done.stderr[-2000:]}"
