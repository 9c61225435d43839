"""Replicas without Ray: what each takes of its machine, whose turn it is to load, and lines that it answers."""

from __future__ import annotations

import dataclasses
import json
import pickle
import socket
from pathlib import Path
from typing import Any

import pytest
from fakes_session import Shelf

from subspec_cli.cli.ray_options import check_ray, named_model
from subspec_cli.config import Config, MemoryConfig
from subspec_cli.config_file import resolve_config
from subspec_cli.errors import ResourceError, UsageError
from subspec_cli.planning.assumed_costs import assumed_costs
from subspec_cli.serving.batch import BatchRun, longest_request
from subspec_cli.serving.job import Job, open_job
from subspec_cli.serving.job_results import JobResults
from subspec_cli.serving.ray_cluster import Cluster, check_answers, checked_cluster
from subspec_cli.serving.replica import Place, Replica, Share
from subspec_cli.serving.replica_shares import Placement, common_threads, share_of
from subspec_cli.session.machine_costs import SharedCosts

GIB = 1 << 30
HERE = Place("here", "m1", "a processor", 8, 16 * GIB, 32 * GIB)
THERE = dataclasses.replace(HERE, host="there", machine="m2", threads=6)


def config_of(**memory: Any) -> Config:
    return Config(memory=MemoryConfig(**{"device": "cpu", **memory}))


def test_threads_are_the_same_for_all_and_the_fewest() -> None:
    assert common_threads([HERE], None) == 8
    assert common_threads([HERE, HERE, THERE], None) == 4
    assert common_threads([HERE, HERE, THERE, THERE, THERE], None) == 2
    assert common_threads([HERE] * 9, None) == 1
    assert common_threads([HERE, THERE], "3") == 3
    assert common_threads([HERE, THERE], "many") == 6


def test_a_budget_that_nobody_gave_is_an_equal_part() -> None:
    places: dict[Any, Place] = {0: HERE, 1: HERE, 2: THERE}
    assert share_of(2, places, config_of(), 2) == Share(config_of(), 2, 1)
    share = share_of(0, places, config_of(), 2)
    assert share.sharers == 2
    assert share.config.memory.memory_gib == pytest.approx(16 * 0.75 / 2)
    gpu = share_of(0, places, config_of(device="cuda"), 2).config.memory
    assert (gpu.memory_gib, gpu.ram_gb) == (None, pytest.approx(16 * 0.75 / 2))


def test_a_budget_is_per_replica_and_must_fit_as_often() -> None:
    places: dict[Any, Place] = {0: HERE, 1: HERE}
    assert share_of(0, places, config_of(memory_gib=10.0), 1).config.memory.memory_gib == 10
    with pytest.raises(ResourceError, match=r"2 replicas of 20.0 GiB are more than here has: 32.0 GiB"):
        share_of(0, places, config_of(memory_gib=20.0), 1)


def test_the_first_replica_of_a_machine_loads_alone() -> None:
    placement = Placement(config_of(), 4, None)
    for number, place in enumerate((HERE, HERE, HERE)):
        assert placement.place(number, place) == []
        assert placement.share(number) is None, "until all have a place"
    placement.place(3, THERE)
    shares = [placement.share(number) for number in range(4)]
    assert [share is not None for share in shares] == [True, False, False, True]
    placement.loaded(0)
    rest = [placement.share(1), placement.share(2)]
    assert {share.threads for share in (*rest, shares[0], shares[3]) if share} == {2}
    assert all(rest)


def test_another_replica_takes_the_turn_of_one_that_died() -> None:
    placement = Placement(config_of(), 2, None)
    placement.place("a", HERE)
    placement.place("b", HERE)
    assert placement.share("a") is not None
    assert placement.share("b") is None
    placement.lost("a")
    assert placement.share("b") is not None
    placement.place("c", dataclasses.replace(HERE, free_bytes=GIB))
    placement.loaded("b")
    share = placement.share("c")
    assert share is not None
    assert share.config.memory.memory_gib == pytest.approx(6), "of what was free before the first"


def test_places_differ_in_processor_or_version() -> None:
    placement = Placement(config_of(), 2, None)
    placement.place(0, HERE)
    notes = placement.place(1, dataclasses.replace(THERE, processor="another"))
    assert "here and there have other processors" in notes[0]
    with pytest.raises(UsageError, match=r"subspec 9.9 is installed on here"):
        placement.place(1, dataclasses.replace(HERE, version="9.9"))


@pytest.mark.parametrize(("device", "link_share"), [("cpu", 3), ("cuda", 1)])
def test_replicas_on_one_machine_share_its_disk(device: str, link_share: int, shelf: Shelf) -> None:
    from subspec_cli.session.found_model import find_model

    found = find_model(resolve_config({"model": {"model": str(shelf.model("llama"))}}))
    settings = found.prepared.manifest.settings
    alone = assumed_costs(found.geometry, device, settings=settings)
    shared = SharedCosts(lambda geometry, settings: alone, 3, device)(found.geometry, settings)
    assert shared.disk_bytes_per_s == pytest.approx(alone.disk_bytes_per_s / 3, rel=0.03)
    assert shared.link_bytes_per_s == pytest.approx(alone.link_bytes_per_s / link_share, rel=0.03)
    assert shared.target_layer == alone.target_layer


def test_ray_options_need_each_other_and_ray() -> None:
    check_ray(None, None)
    with pytest.raises(UsageError, match="--replicas 2 needs Ray") as caught:
        check_ray(None, 2)
    assert "--ray local --replicas 2" in caught.value.hint


def test_without_the_extra_the_command_says_what_to_install(monkeypatch: Any) -> None:
    monkeypatch.setattr("subspec_cli.cli.ray_options.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="ray is not installed") as caught:
        check_ray("local", 2)
    assert caught.value.hint == "pip install 'subspec-cli[ray]'"


def test_a_directory_is_named_in_full(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    named = named_model(resolve_config({"model": {"model": "model"}}))
    assert named.model.model == str(tmp_path / "model")
    monkeypatch.setenv("SUBSPEC_HOME", str(tmp_path / "home"))
    with pytest.raises(UsageError, match="no model is named"):
        named_model(Config())


FOUND = {"CPU": 8.0, "GPU": 3.0}


@pytest.mark.parametrize(
    ("found", "replicas", "device", "taken"),
    [
        (FOUND, None, "auto", Cluster(3, "cuda")),
        (FOUND, 2, "auto", Cluster(2, "cuda")),
        (FOUND, None, "cpu", Cluster(2, "cpu")),
        (FOUND, 8, "cpu", Cluster(8, "cpu")),
        ({"CPU": 8.0}, None, "auto", Cluster(2, "cpu")),
    ],
)
def test_a_replica_for_each_gpu_or_node(found: Any, replicas: Any, device: str, taken: Cluster) -> None:
    assert checked_cluster(found, 2, replicas, device) == taken
    assert taken.actor_options["num_gpus"] == (taken.device == "cuda")


@pytest.mark.parametrize(
    ("found", "device", "words", "hint"),
    [
        (FOUND, "auto", "9 replicas need as many GPUs, the cluster has 3", "--replicas 3"),
        (FOUND, "cpu", "9 replicas need as many processors, the cluster has 8", "--replicas 8"),
        ({"CPU": 8.0}, "cuda", "9 replicas need as many GPUs, the cluster has 0", "--device cpu"),
    ],
)
def test_a_cluster_that_is_too_small(found: Any, device: str, words: str, hint: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        checked_cluster(found, 2, 9, device)
    assert hint in caught.value.hint


def test_an_address_where_nothing_listens_is_said_at_once() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ResourceError, match=f"nothing answers at {address}: Connection refused"):
            check_answers(address)
        listener.listen()
        check_answers(address)
    for known_by_ray in ("local", "auto", "ray://127.0.0.1:1"):
        check_answers(known_by_ray)


def job_of(folder: Path) -> Job:
    lines: list[Any] = [{"prompt": f"abc {number}", "max_tokens": 3 + number} for number in range(5)]
    lines += [{"prompt": "hello", "n": 2, "temperature": 0.9, "max_tokens": 6}, {"prompt": 5}]
    path = folder / "in"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return open_job(path)


def without_figures(record: dict[str, Any]) -> dict[str, Any]:
    body = record["response"]["body"]
    kept = {key: body[key] for key in body if key not in ("created", "subspec", "usage")}
    tokens = body.get("usage", {}).get("completion_tokens")
    return {**record, "response": {**record["response"], "body": kept}, "tokens": tokens}


def test_a_replica_gives_the_records_of_one_process(shelf: Shelf, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    job = job_of(tmp_path)
    directory = shelf.model("llama")
    config = resolve_config(
        {
            "model": {"model": str(directory)},
            "memory": {"vram_gb": 1.0, "device": "cpu", "resident_layers": 0},
        }
    )
    longest = longest_request(job, system=None, raw=False, answer_tokens=8)
    replica = Replica()
    facts = pickle.loads(pickle.dumps(replica.open(Share(config, 1, 2), longest, 2)))
    assert facts.parallel == 2
    assert any("2 replicas are on this machine" in note for note in facts.description.notes)
    lines, records = pickle.loads(pickle.dumps(list(job))), []
    waiting = [lines[:3], lines[3:]]
    while len(records) < 7:
        done = replica.work(waiting.pop(0) if waiting else [], job.sha256, 4)
        records += [result.record for result in pickle.loads(pickle.dumps(done)).results]
    last = replica.work([], job.sha256, 4)
    assert (last.results, last.in_flight, last.open_tokens) == ((), 0, 0)

    session = replica._session
    assert session is not None
    with session, JobResults(tmp_path / "out", {"seed": 4}, fresh_seed=0) as results:
        BatchRun(session, job, results, lambda state: None).run()
    alone = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    by_id = {record["id"]: without_figures(record) for record in records}
    assert by_id == {record["id"]: without_figures(record) for record in alone}
    assert len(by_id) == 7
