"""Refusals of writes that the disk has too little free space for."""

from __future__ import annotations

import pytest

from subspec_cli.errors import ResourceError
from subspec_cli.files.free_space import check_free_space


def test_free_space(tmp_path):
    check_free_space(tmp_path / "not" / "yet", 1, "a test")
    with pytest.raises(ResourceError, match=r"a test needs 1024.0 TiB of disk, .* has .* free") as caught:
        check_free_space(tmp_path / "not" / "yet", 1 << 50, "a test")
    assert "SUBSPEC_HOME" in caught.value.hint
