"""Host memory and processor time that a container, a service or `ulimit` leaves, read from made-up /proc and /sys."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from subspec_cli.config import Config, MemoryConfig
from subspec_cli.errors import ResourceError
from subspec_cli.planning.request import budget_bytes
from subspec_cli.streaming.cgroup import processor_quota
from subspec_cli.streaming.host_memory import gpu_memory, host_memory
from subspec_cli.streaming.process_limits import check_libraries_fit
from subspec_cli.streaming.processors import Processors
from subspec_cli.units import GIB, MIB

MEMINFO = f"MemTotal: {24 << 20} kB\nMemAvailable: {20 << 20} kB\n"
UNLIMITED_V1 = "9223372036854771712\n"
V2 = "30 29 0:26 {top} /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw,nsdelegate\n"
V1 = "35 31 0:32 {top} /sys/fs/cgroup/{name} rw - cgroup cgroup rw,{name}\n"


def machine(root: Path, files: dict[str, str]) -> Path:
    """A root directory with these files, `/proc/meminfo` among them."""
    for name, content in {"proc/meminfo": MEMINFO, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def version_2(own: str, groups: dict[str, dict[str, str]], top: str = "/") -> dict[str, str]:
    files = {
        "proc/self/cgroup": f"0::{own}\n",
        "proc/self/mountinfo": f"22 1 8:1 / / rw - ext4 /dev/x rw\n{V2.format(top=top)}",
    }
    for group, contents in groups.items():
        files |= {f"sys/fs/cgroup{group}/{name}": text for name, text in contents.items()}
    return files


def version_1(own: str, groups: dict[str, dict[str, str]], top: str = "/") -> dict[str, str]:
    files = {
        "proc/self/cgroup": f"9:name=systemd:/x\n4:memory:{own}\n2:cpu,cpuacct:{own}\n0::/\n",
        "proc/self/mountinfo": V1.format(top=top, name="memory")
        + V1.format(top=top, name="cpu,cpuacct")
        + "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
        "sys/fs/cgroup/unified/cgroup.procs": "1\n",
    }
    for group, contents in groups.items():
        for name, text in contents.items():
            controller = "memory" if name.startswith("memory") else "cpu,cpuacct"
            files[f"sys/fs/cgroup/{controller}{group}/{name}"] = text
    return files


def stat(inactive: int, active: int) -> str:
    return f"anon 5\ninactive_file {inactive}\nactive_file {active}\nslab 3\n"


LIMITED = {
    "memory.max": f"{900 * MIB}\n",
    "memory.current": f"{700 * MIB}\n",
    "memory.stat": stat(MIB, 99 * MIB),
}
LIMITED_V1 = {
    "memory.limit_in_bytes": f"{900 * MIB}\n",
    "memory.usage_in_bytes": f"{700 * MIB}\n",
    "memory.stat": "inactive_file 1\nactive_file 1\n"
    f"total_inactive_file {MIB}\ntotal_active_file {99 * MIB}\n",
}
OPEN = {"memory.max": "max\n", "memory.high": "max\n", "memory.current": f"{GIB}\n"}


@pytest.mark.parametrize(
    ("files", "file"),
    [
        (version_2("/", {"": LIMITED}), "sys/fs/cgroup/memory.max"),
        (version_2("/a/b", {"/a/b": LIMITED, "/a": OPEN}), "sys/fs/cgroup/a/b/memory.max"),
        (version_2("/a/b", {"/a/b": OPEN, "/a": LIMITED}), "sys/fs/cgroup/a/memory.max"),
        (
            version_2("/a", {"/a": {**LIMITED, "memory.max": "max", "memory.high": f"{900 * MIB}"}}),
            "memory.high",
        ),
        # The group's name is that of the host, and the container sees itself as the root.
        (version_2("/docker/abc", {"": LIMITED}), "sys/fs/cgroup/memory.max"),
        (version_2("/docker/abc", {"": LIMITED}, top="/docker/abc"), "sys/fs/cgroup/memory.max"),
        (version_2("/../pod", {"": LIMITED}), "sys/fs/cgroup/memory.max"),
        (version_1("/", {"": LIMITED_V1}), "memory/memory.limit_in_bytes"),
        (
            version_1("/a/b", {"/a/b": LIMITED_V1, "/a": {"memory.limit_in_bytes": UNLIMITED_V1}}),
            "a/b/memory.",
        ),
        (version_1("/docker/abc", {"": LIMITED_V1}, top="/docker/abc"), "memory/memory.limit_in_bytes"),
        (version_1("/docker/abc", {"": LIMITED_V1}), "memory/memory.limit_in_bytes"),
    ],
)
def test_the_least_limit_counts_and_page_cache_is_not_taken(tmp_path, files, file):
    memory = host_memory(machine(tmp_path, files))
    assert (memory.limit_bytes, memory.free_bytes) == (900 * MIB, 300 * MIB)
    assert file in memory.owner


@pytest.mark.parametrize(
    "files",
    [
        {},
        version_2("/", {"": OPEN}),
        version_2("/", {"": {"memory.max": f"{64 * GIB}", "memory.current": f"{GIB}", "memory.stat": ""}}),
        version_1("/a", {"/a": {"memory.limit_in_bytes": UNLIMITED_V1, "memory.usage_in_bytes": "1"}}),
        {"proc/self/cgroup": "nonsense\n::\n", "proc/self/mountinfo": "nonsense\n - cgroup2\n"},
    ],
)
def test_without_a_limit_below_it_the_machines_memory_counts(tmp_path, files):
    memory = host_memory(machine(tmp_path, files))
    assert (memory.limit_bytes, memory.free_bytes) == (24 * GIB, 20 * GIB)
    assert memory.owner == "this machine has"


def test_the_largest_group_may_have_the_least_left(tmp_path):
    full = {"memory.max": f"{2 * GIB}", "memory.current": f"{2 * GIB}", "memory.stat": stat(0, 10 * MIB)}
    memory = host_memory(machine(tmp_path, version_2("/a/b", {"/a/b": LIMITED, "/a": full})))
    assert (memory.limit_bytes, memory.free_bytes) == (900 * MIB, 10 * MIB)


def test_a_budget_beyond_the_limit_is_refused_and_names_it(tmp_path):
    memory = host_memory(machine(tmp_path, version_2("/", {"": LIMITED})))
    config = Config(memory=MemoryConfig(memory_gib=1.0))
    with pytest.raises(ResourceError, match=r"cgroup/memory\.max\): 900\.0 MiB") as caught:
        budget_bytes(config, "cpu", memory.limit_bytes, memory.free_bytes, memory.owner)
    assert caught.value.hint == "--memory-gb 0.66 leaves a quarter to others"
    default = budget_bytes(Config(), "cpu", memory.limit_bytes, memory.free_bytes, memory.owner)
    assert default == 225 * MIB


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        (version_2("/", {"": {"cpu.max": "max 100000\n"}}), None),
        (version_2("/", {"": {"cpu.max": "150000 100000\n"}}), 1.5),
        (version_2("/a/b", {"/a/b": {"cpu.max": "400000 100000"}, "/a": {"cpu.max": "50000 100000"}}), 0.5),
        (version_1("/", {"": {"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}}), None),
        (version_1("/a", {"/a": {"cpu.cfs_quota_us": "200000\n", "cpu.cfs_period_us": "100000\n"}}), 2.0),
        (version_2("/", {"": {"cpu.max": "lots\n"}}), None),
    ],
)
def test_processor_quota(tmp_path, files, quota):
    assert processor_quota(machine(tmp_path, files)) == quota


def limited(monkeypatch, **limits_bytes: int) -> None:
    read = resource.getrlimit
    chosen = {getattr(resource, name): (size, size) for name, size in limits_bytes.items()}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: chosen.get(kind) or read(kind))


@pytest.mark.parametrize(("name", "flag"), [("RLIMIT_AS", "-v"), ("RLIMIT_DATA", "-d")])
def test_too_little_for_the_libraries_is_refused_before_they_are_loaded(monkeypatch, name, flag):
    check_libraries_fit()
    limited(monkeypatch, **{name: 300 * MIB})
    with pytest.raises(
        ResourceError, match=rf"ulimit {flag} 307200 allows 300\.0 MiB, libraries take"
    ) as caught:
        check_libraries_fit()
    assert f"ulimit {flag} unlimited" in caught.value.hint


def test_what_the_libraries_leave_of_a_limit_is_the_most_of_a_budget(tmp_path, monkeypatch):
    limited(monkeypatch, RLIMIT_AS=3 * GIB)
    monkeypatch.setattr(
        "subspec_cli.streaming.process_limits.usable_processors", lambda: Processors(2, 2, None)
    )
    root = machine(tmp_path, {"proc/self/status": f"VmSize: {2 << 20} kB\n"})
    memory = host_memory(root)
    assert (memory.limit_bytes, memory.free_bytes) == (2 * GIB, GIB)
    assert memory.owner == "ulimit -v 3145728 leaves beside the libraries"
    (root / "proc/self/status").write_text(f"VmSize: {64 << 10} kB\n")
    assert host_memory(root).free_bytes == 2 * GIB


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("echo 8188, 7012", (8188 * MIB, 7012 * MIB)),
        ("echo '[N/A], 1'", None),
        ("echo 1, 2; exit 9", None),
    ],
)
def test_the_drivers_tool_says_what_is_free_of_a_gpu(tmp_path, monkeypatch, script, found):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert gpu_memory() == found
    tool.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_memory() is None
