"""Traces of routing: what is written is read back, a cut one is read as far as it goes, damage gets a sentence."""

import errno
import json
import os

import numpy as np
import pytest

from tiny_qmoe_mlx.errors import FormatError
from tiny_qmoe_mlx.streaming import trace

MODEL = {"model": "a/b", "experts": [8, 4], "config": "00ff"}
HEADER = trace.header(MODEL, [8, 4], [1024, 2048])


def lines(*rest: str, header: object = HEADER) -> bytes:
    return "".join(f"{line}\n" for line in (json.dumps(header), *rest)).encode()


def choices(rng, tokens: int, experts: int, k: int) -> np.ndarray:
    return np.stack([rng.permutation(experts)[:k] for _ in range(tokens)])


def test_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    written = []
    writer = trace.TraceWriter(tmp_path / "t", HEADER)
    for tokens in (20, 1, 1, 8):
        for layer, experts in enumerate(HEADER["experts"]):
            written.append((layer, tokens > 8, choices(rng, tokens, experts, 3)))
            writer.write(layer, written[-1][2], tokens > 8)
    writer.close()
    writer.close()
    found = trace.read_trace(tmp_path / "t")
    assert (found.model, found.experts, found.record_bytes) == (MODEL, [8, 4], [1024, 2048])
    assert [(c.layer, c.cold) for c in found.calls] == [(layer, cold) for layer, cold, _ in written]
    for call, (_, _, chosen) in zip(found.calls, written, strict=True):
        assert np.array_equal(call.chosen, chosen)
    assert (found.tokens(cold=True), found.tokens(cold=False)) == (20, 10)
    first = (tmp_path / "t").read_text().split("\n")[1].split()
    assert first[:3] == ["0", "0", "p"] and first[3] == ",".join(map(str, written[0][2][0]))


def test_cut_in_mid_line_is_read_to_the_last_whole_line(tmp_path):
    whole = lines("0 0 d 1,2", "0 1 d 0,3", "1 0 d 7,6")
    for cut in range(1, len("1 0 d 7,6") + 1):
        (tmp_path / "t").write_bytes(whole[:-cut])
        calls = trace.read_trace(tmp_path / "t").calls
        assert [(c.layer, c.chosen.tolist()) for c in calls] == [(0, [[1, 2]]), (1, [[0, 3]])]


def test_header_alone_is_an_empty_trace(tmp_path):
    (tmp_path / "t").write_bytes(lines())
    assert trace.read_trace(tmp_path / "t").calls == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "should be a call, a layer"),
        ("0 0 d", "should be a call, a layer"),
        ("0 0 d 1,", "should be a call, a layer"),
        ("x 0 d 1", "should be a call, a layer"),
        ("0 0 d 1 2", "4 words"),
        ("0 0 q 1", "4 words"),
        ("0 2 d 1", "a layer in 0 to 1"),
        ("0 -1 d 1", "a layer in 0 to 1"),
        ("0 1 d 4", "distinct experts in 0 to 3"),
        ("0 1 d -1", "distinct experts in 0 to 3"),
        ("0 0 d 1,1", "distinct experts"),
        ("0 0 d " + "9" * 4000, "distinct experts"),
        ("0 0 d " + "9" * 5000, "should be a call, a layer"),
        ("1 0 d 1", "begin call 0"),
        ("-1 0 d 1", "begin call 0"),
        ("0 0 d " + "1," * 40000 + "1", "at most 65536 bytes"),
        ("0 0 d \xff", "should be a call"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    (tmp_path / "t").write_bytes(lines(line, "0 0 d 1"))
    with pytest.raises(FormatError, match=rf"line 2 .*{words}") as error:
        trace.read_trace(tmp_path / "t")
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


@pytest.mark.parametrize("line", ["0 0 d 1,2,3", "0 0 p 1,2", "2 0 d 1,2", "0 1 d 4,3"])
def test_a_line_that_contradicts_the_one_before(tmp_path, line):
    (tmp_path / "t").write_bytes(lines("0 0 d 1,2", line))
    with pytest.raises(FormatError, match="line 3"):
        trace.read_trace(tmp_path / "t")


@pytest.mark.parametrize(
    "header",
    [
        [],
        None,
        {},
        {**HEADER, trace.KEY: 2},
        {**HEADER, trace.KEY: True},
        {**HEADER, "model": "a"},
        {**HEADER, "experts": []},
        {**HEADER, "experts": [8, 0]},
        {**HEADER, "experts": [8, 65537]},
        {**HEADER, "experts": [8, 4.0]},
        {**HEADER, "experts": [8, True]},
        {**HEADER, "experts": [8] * 2049},
        {**HEADER, "record_bytes": [1024]},
        {**HEADER, "record_bytes": [1024, 1 << 40]},
        {**HEADER, "record_bytes": "ab"},
    ],
)
def test_a_bad_header(tmp_path, header):
    (tmp_path / "t").write_bytes(lines("0 0 d 1", header=header))
    with pytest.raises(FormatError, match="record it again"):
        trace.read_trace(tmp_path / "t")


@pytest.mark.parametrize("raw", [b"", b"\x00" * 100, b"[" * 100000 + b"\n", json.dumps(HEADER).encode(), b"\xff\xfe\n"])
def test_no_trace_at_all(tmp_path, raw):
    (tmp_path / "t").write_bytes(raw)
    with pytest.raises(FormatError, match="begin with the line of a routing trace"):
        trace.read_trace(tmp_path / "t")


def test_noise_never_gets_past_the_reader(tmp_path):
    rng = np.random.default_rng(1)
    good = lines("0 0 d 1,2", "0 0 d 3,4", "0 1 d 0,3", "1 0 d 7,6")
    for _ in range(300):
        bad = bytearray(good)
        for at in rng.integers(0, len(bad), 3):
            bad[at] = rng.integers(256)
        (tmp_path / "t").write_bytes(bad)
        try:
            found = trace.read_trace(tmp_path / "t")
        except FormatError:
            continue
        for call in found.calls:
            assert 0 <= call.chosen.min() and call.chosen.max() < found.experts[call.layer]


def test_another_model_is_refused(tmp_path):
    (tmp_path / "t").write_bytes(lines())
    found = trace.read_trace(tmp_path / "t")
    found.check(dict(MODEL))
    with pytest.raises(FormatError, match=r"should be a trace of 'c/d', is one of another model, 'a/b'"):
        found.check({**MODEL, "model": "c/d"})
    with pytest.raises(FormatError, match="with another config"):
        found.check({**MODEL, "config": "1"})


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence():
    writer = trace.TraceWriter("/dev/full", HEADER)
    with pytest.raises(OSError, match="the disk is full, the trace ends early") as error:
        writer.close()
    assert error.value.errno == errno.ENOSPC
    writer.write(0, np.array([[1]]), False)  # a model that runs on
    writer.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_fills_while_writing():
    writer = trace.TraceWriter("/dev/full", HEADER)
    with pytest.raises(OSError, match="the disk is full"):
        for _ in range(20000):
            writer.write(0, np.tile(np.arange(8), (64, 1)), True)
