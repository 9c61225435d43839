"""Reads of regular files, and refusals of everything else."""

from __future__ import annotations

import os

import pytest

from subspec_cli.errors import IntegrityError, ResourceError
from subspec_cli.files.regular_file import open_regular, read_small_file, sha256_file


def test_hash(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a").startswith("ba7816bf")


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "a named pipe"),
        (os.mkdir, "a directory"),
        (lambda path: path.symlink_to("/dev/zero"), "device"),
    ],
)
def test_special_files_are_refused_without_waiting(tmp_path, make, kind):
    make(tmp_path / "x")
    for reader in (open_regular, sha256_file, lambda path: read_small_file(path, 9)):
        with pytest.raises(IntegrityError, match=kind):
            reader(tmp_path / "x")


@pytest.mark.parametrize("name", ["missing", "a\0b"])
def test_missing_file_and_impossible_name(tmp_path, name):
    with pytest.raises((IntegrityError, ResourceError), match="cannot read"):
        open_regular(tmp_path / name)


def test_size_limit(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_small_file(tmp_path / "a", 5) == b"12345"
    with pytest.raises(IntegrityError, match=r"has 5 bytes; at most 4 B"):
        read_small_file(tmp_path / "a", 4)
