"""Every malformed safetensors header is refused by name. None is trusted, hangs or fills the memory."""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import sys

import numpy as np
import pytest
import safetensors
from checkpoints import bf16, framed, safetensors_bytes, tiny_tensors

from subspec_cli.checkpoint.safetensors_header import read_header
from subspec_cli.errors import ExitCode, IntegrityError, UnsupportedModelError


def info(dtype="U8", shape=(4,), offsets=(0, 4), **more) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | more


def file_of(header, data: bytes = b"1234") -> bytes:
    return framed(header if isinstance(header, (str, bytes)) else json.dumps(header)) + data


def test_entries_in_file_order_with_absolute_offsets(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(
        safetensors_bytes(
            {"b": ("U8", (3,), b"xyz"), "a": ("I64", (), bytes(8)), "empty": ("F32", (0, 2), b"")}
        )
    )
    header = read_header(path)
    assert [entry.name for entry in header.entries] == ["b", "a", "empty"]
    b, a, _ = header.entries
    assert (b.dtype, b.shape, b.size_bytes, b.path) == ("U8", (3,), 3, path)
    assert a.offset_bytes == b.offset_bytes + 3 == len(header.raw) + 3
    assert path.read_bytes()[b.offset_bytes : a.offset_bytes] == b"xyz"
    assert header.status.st_size == path.stat().st_size


def test_metadata_and_the_empty_file(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(file_of({"__metadata__": {"format": "pt"}, "a": info()}))
    assert len(read_header(path).entries) == 1
    path.write_bytes(file_of({}, b""))
    assert read_header(path).entries == ()


DAMAGED = {
    "empty file": (b"", "has 0 bytes"),
    "7 bytes": (b"1234567", "has 7 bytes"),
    "length 2^63": (bytes([0] * 7 + [128]) + b"{}", "9223372036854775808 bytes, at most 25000000"),
    "length over the limit": ((30_000_000).to_bytes(8, "little") + b"{}", "30000000 bytes, at most"),
    "length past the end": ((99).to_bytes(8, "little") + b"{}", "99 bytes but has only 10"),
    "length 0": (bytes(8) + b"{}", "header of 0 bytes"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "not UTF-8 at byte 2"),
    "not JSON": (file_of('{"a": '), "not JSON at byte"),
    "too deep": (file_of("[" * 100_000), "nested too deeply"),
    "a list": (file_of("[1]"), "holds a list"),
    "endless number": (file_of('{"a": ' + "9" * 5000 + "}"), "number that is too long"),
    "NaN": (file_of('{"a": NaN}'), "describes a otherwise"),
    "one byte short": (file_of({"a": info()}, b"123"), "should have 76 bytes by its header, has 75"),
    "one byte over": (file_of({"a": info()}, b"12345"), "should have 76 bytes by its header, has 77"),
    "hole at the start": (
        file_of({"a": info(offsets=(1, 5))}, b"12345"),
        "a hole before a: expected offset 0, found 1",
    ),
    "hole inside": (
        file_of({"a": info(), "b": info(offsets=(5, 9))}, b"123456789"),
        "a hole before b: expected offset 4, found 5",
    ),
    "overlap": (file_of({"a": info(), "b": info(offsets=(2, 6))}, b"123456"), "an overlap before b"),
    "reversed": (file_of({"a": info(offsets=(4, 0))}), r"a the offsets \[4, 0\]"),
    "negative": (file_of({"a": info(offsets=(-4, 0))}), "a the offsets"),
    "three offsets": (file_of({"a": info(offsets=(0, 4, 4))}), "a the offsets"),
    "boolean offset": (file_of({"a": info(offsets=(False, 4))}), "a the offsets"),
    "fraction": (file_of({"a": info(shape=(4.0,))}), "a the shape"),
    "shape against size": (file_of({"a": info(shape=(5,))}), r"gives a 4 bytes, U8 of shape \[5\] needs 5"),
    "overflowing shape": (file_of({"a": info(shape=(1 << 62, 1 << 62, 16))}), "gives a 4 bytes"),
    "wrapping shape": (
        file_of({"a": info(shape=(1 << 32, 1 << 32, 4), offsets=(0, 0))}, b""),
        "gives a 0 bytes",
    ),
    "9 dimensions": (file_of({"a": info(shape=[1] * 8 + [4])}), "up to 8 sizes"),
    "5000 dimensions": (file_of({"a": info(shape=[1] * 4999 + [4])}), "up to 8 sizes"),
    "dtype no text": (file_of({"a": info(dtype=["U8"])}), "the dtype"),
    "missing field": (file_of({"a": {"dtype": "U8", "shape": [4]}}), "describes a otherwise"),
    "unknown field": (file_of({"a": info(more=1)}), "describes a otherwise"),
    "no table": (file_of({"a": 3}), "describes a otherwise"),
    "metadata no texts": (file_of({"__metadata__": {"a": 1}, "a": info()}), "__metadata__"),
    "escape in a name": (file_of({"\x1b[2J": info()}), r"not allowed: '\\x1b\[2J'"),
    "path in a name": (file_of({"../a": info()}), "not allowed"),
    "lone surrogate": (file_of('{"\\ud800": 1}'), r"not allowed: '\\ud800'"),
    "long name": (file_of({"a" * 513: info()}), "not allowed"),
    "duplicate key": (
        file_of('{"a": %s, "a": %s}' % ((json.dumps(info()),) * 2)),
        "the key 'a' twice",
    ),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
    "HTML page": (b"\n<!DOCTYPE html><html><body>503</body></html>", "an HTML page"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0"])
def test_types_of_one_byte_are_read_as_such(tmp_path, dtype):
    path = tmp_path / "a.safetensors"
    path.write_bytes(file_of({"a": info(dtype=dtype)}))
    assert read_header(path).entries[0].dtype == dtype


def test_types_of_less_than_a_byte_and_of_eight(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(file_of({"a": info(dtype="F4", shape=(8,))}))
    assert read_header(path).entries[0].size_bytes == 4
    path.write_bytes(file_of({"a": info(dtype="C64", shape=(1,), offsets=(0, 8))}, bytes(8)))
    assert read_header(path).entries[0].shape == (1,)


def test_a_type_that_is_not_known_is_not_called_damage(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(file_of({"a": info(dtype="F3_NEW")}))
    with pytest.raises(UnsupportedModelError, match="a in 'F3_NEW'"):
        read_header(path)


@pytest.mark.parametrize(("data", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damage_is_reported_by_name(tmp_path, data, message):
    path = tmp_path / "model-\x1b.safetensors"
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=message) as caught:
        read_header(path)
    assert caught.value.exit_code == ExitCode.INTEGRITY
    assert "model-\\x1b.safetensors" in caught.value.message
    assert "\x1b" not in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    "header",
    [
        "{"
        + ",".join(f'"t{n}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for n in range(250_000))
        + "}",
        '{"a":[' + "[],[]," * 3_000_000 + "[]]}",
        '{"a":[' + "123456," * 3_500_000 + "1]}",
    ],
    ids=["too many tensors", "too many lists", "too many numbers"],
)
def test_bombs_cost_little(tmp_path, header):
    path = tmp_path / "a.safetensors"
    path.write_bytes(framed(header))
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    calls = itertools.count()
    sys.setprofile(lambda *_: next(calls))
    try:
        with pytest.raises(IntegrityError, match=r"too many values|tensors, at most 200000|claims a header"):
            read_header(path)
    finally:
        sys.setprofile(None)
    assert next(calls) < 2_000_000, "a few calls for each of 250,000 tensors"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 400 << 10


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_no_file(tmp_path, make):
    make(tmp_path / "a.safetensors")
    with pytest.raises(IntegrityError, match="not a file"):
        read_header(tmp_path / "a.safetensors")


def test_mutated_files_are_refused_or_agree_with_the_reference(tmp_path):
    """A header that our parser accepts is accepted by the format's own parser, with the same tensors."""
    chance = random.Random(7)
    good = safetensors_bytes(dict(list(tiny_tensors(layers=1, hidden=8).items())[1:4]) | {"s": bf16_scalar()})
    header_bytes = 8 + int.from_bytes(good[:8], "little")
    path = tmp_path / "a.safetensors"
    accepted = 0
    for _ in range(600):
        data = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            place = chance.randrange(header_bytes)
            if chance.random() < 0.5:
                data[place] = chance.choice(b'0123456789[]{},:" aU8F')
            else:
                del data[place : place + chance.randint(0, 3)]
        path.write_bytes(data)
        try:
            entries = read_header(path).entries
        except (IntegrityError, UnsupportedModelError):
            continue
        accepted += 1
        reference = dict(safetensors.deserialize(bytes(data)))
        assert {entry.name: list(entry.shape) for entry in entries} == {
            name: value["shape"] for name, value in reference.items()
        }
    assert 0 < accepted < 600


def bf16_scalar():
    return bf16(np.zeros(()))
