"""A model of more files than a process may have open."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes_session import answer_to, open_tiny, prepare_quietly
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_model

from subspec_cli.errors import ResourceError
from subspec_cli.files.direct_io import DirectReader, Extent
from subspec_cli.files.open_files import raise_open_files_limit

SHARDS = 100


@pytest.fixture
def limit() -> Iterator[int]:
    """A soft limit of 64 open files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, before[1]))
    yield 64
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def in_shards(directory: Path) -> Path:
    """Write every tensor of a model to a file of its own."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    files = {name: f"model-{at:05d}-of-{len(tensors):05d}.safetensors" for at, name in enumerate(tensors, 1)}
    for name, file in files.items():
        save_file({name: tensors[name]}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert len(files) >= SHARDS
    return directory


def open_files(directory: Path) -> list[str]:
    """What this process has open in a directory."""
    links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return [
        found
        for link in links
        if os.path.islink(link) and (found := os.readlink(link)).startswith(f"{directory}/")
    ]


def test_a_model_of_more_files_than_may_be_open_is_read(tmp_path, monkeypatch, limit):
    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path / "home"))
    model = in_shards(make_tiny_model(tmp_path / "model", "llama", layers=12, tied=False))
    prepare_quietly(model)
    with open_tiny(model) as session:
        assert len(answer_to(session, "Hello", 6).token_ids) == 6
        assert 0 < len(open_files(model)) <= 32
    assert not open_files(model)


def test_the_command_line_raises_the_limit(limit):
    raise_open_files_limit()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft == min(hard, 4096)


def test_where_no_file_can_be_opened_the_limit_is_named(tmp_path, limit):
    """Not called damaged."""
    path = tmp_path / "weights"
    path.write_bytes(b"\1" * 4096)
    taken = []
    reader = DirectReader()
    try:
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        with pytest.raises(ResourceError, match="EMFILE") as caught:
            reader.read_extents([Extent(path, 0, 4096, 0)], memoryview(bytearray(4096)))
    finally:
        for descriptor in taken:
            os.close(descriptor)
    assert caught.value.hint.startswith("ulimit -n 4096 (now 64)")
