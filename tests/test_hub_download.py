"""Downloads despite all faults of a hub. The numbers are those of the table of failures."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from fake_hub import COMMIT, MODEL, FakeHub, Fault, git_sha1, running
from fakes_store import HASTE, LAYERS, content, opened, resolve_model, run

from subspec_cli.checkpoint.checkpoint import open_checkpoint
from subspec_cli.errors import AccessError, ExitCode, IntegrityError, NetworkError, ResourceError
from subspec_cli.files.regular_file import sha256_file
from subspec_cli.hub import source_model
from subspec_cli.hub.partial_file import ContentDigest
from subspec_cli.hub.retry import RetryPolicy

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def large(server, tmp_path):
    """The hub with shards of more than one first piece (256 KiB)."""
    source = write_checkpoint(tmp_path / "large", layers=LAYERS, hidden=128, shards=2)
    server.files = {path.name: path.read_bytes() for path in source.iterdir()}
    assert all(len(server.files[name]) > 300_000 for name in (ONE, TWO))
    return server


def blobs(cache) -> Path:
    return cache / "models--org--tiny" / "blobs"


def partials(cache) -> list[Path]:
    return sorted(blobs(cache).glob("*.incomplete"))


def check_whole_files(server, snapshot):
    for path in snapshot.iterdir():
        assert path.read_bytes() == server.files[path.name]


def check_whole(server, cache, snapshot):
    """Every file has its bytes and its name in the cache, and nothing else is there."""
    check_whole_files(server, snapshot)
    for path in snapshot.iterdir():
        assert path.is_symlink()
        assert path.resolve().name == server.etag(path.name)
    assert len(list(blobs(cache).iterdir())) == len(list(snapshot.iterdir()))


def test_layout_is_the_hub_librarys_own(large, cache):
    from huggingface_hub import scan_cache_dir, snapshot_download

    directory = resolve_model(MODEL).directory
    check_whole(large, cache, directory)
    assert os.readlink(directory / ONE) == f"../../blobs/{large.etag(ONE)}"
    assert (cache / "models--org--tiny" / "refs" / "main").read_text() == COMMIT
    assert snapshot_download(MODEL, local_files_only=True) == str(directory)
    (repo,) = scan_cache_dir(cache).repos
    assert (repo.repo_id, repo.size_on_disk) == (MODEL, sum(map(len, large.files.values())))


def test_files_that_the_hub_library_fetched_are_used(large, cache):
    from huggingface_hub import hf_hub_download

    hf_hub_download(MODEL, ONE)
    large.ranges.clear()
    check_whole(large, cache, resolve_model(MODEL).directory)
    assert ONE not in large.fetched()


def test_a_blob_without_a_name_is_used(large, cache):
    first = resolve_model(MODEL).directory
    (first / ONE).unlink()
    large.ranges.clear()
    check_whole(large, cache, resolve_model(MODEL).directory)
    assert large.ranges == []


def test_f20_f27_dropped_connections_are_continued_where_they_broke(large, cache):
    large.faults = {ONE: Fault(times=20, after_bytes=40_000), TWO: Fault(times=3, after_bytes=100_000)}
    notices = []
    directory = resolve_model(MODEL, notices=notices).directory
    check_whole(large, cache, directory)
    starts = [int(asked.split("=")[1].split("-")[0]) for name, asked in large.ranges if name == ONE]
    assert len(starts) > 5
    assert starts == sorted(set(starts))
    assert any("trying again in" in text for text in notices)
    assert large.sent_bytes < 1.01 * sum(map(len, large.files.values())) + 22 * 40_000


def test_f20_a_connection_that_stays_silent_is_given_up_with_what_is_there(large, cache):
    large.faults = {TWO: Fault(times=99, after_bytes=0, stall_s=0.5)}
    with pytest.raises(NetworkError, match=rf"0 B of .* KiB of {TWO} are here") as caught:
        resolve_model(MODEL)
    assert "run the same command again: it continues there" in caught.value.hint
    large.faults = {}
    large.ranges.clear()
    check_whole(large, cache, resolve_model(MODEL).directory)
    assert (ONE, "bytes=0-262143") not in large.ranges


def test_f20_silence_in_the_middle_is_a_new_attempt(large, cache):
    large.faults = {TWO: Fault(times=1, after_bytes=50_000, stall_s=0.6)}
    check_whole(large, cache, resolve_model(MODEL).directory)


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_f16_to_f18_answers_that_pass(large, cache, status):
    headers = {"Retry-After": "0"} if status == 429 else {}
    large.faults = {ONE: Fault(times=2, status=status, headers=headers)}
    large.head_faults = {
        TWO: Fault(times=2, status=status),
        f"/api/models/{MODEL}": Fault(times=2, status=status),
    }
    notices = []
    check_whole(large, cache, resolve_model(MODEL, notices=notices).directory)
    assert len([text for text in notices if f"answered {status}" in text]) == 6
    assert any("(attempt 3 of 4)" in text for text in notices)


def test_f16_retry_after_is_heeded(large, monkeypatch):
    waits = []
    monkeypatch.setattr(
        "subspec_cli.hub.workers.WorkerChannel.pause", lambda self, seconds: waits.append(seconds)
    )
    large.faults = {ONE: Fault(times=1, status=429, headers={"Retry-After": "1"})}
    resolve_model(MODEL)
    assert waits == [1.0]


@pytest.mark.parametrize("asked", ["3600", "Wed, 21 Oct 2150 07:28:00 GMT"])
def test_f16_too_long_a_wait_is_reported_and_not_waited_for(large, cache, asked):
    large.faults = {TWO: Fault(times=1, status=429, headers={"Retry-After": asked})}
    with pytest.raises(NetworkError, match=f"answered 429, asks to wait {asked[:20]}"):
        resolve_model(MODEL)
    large.ranges.clear()
    check_whole(large, cache, resolve_model(MODEL).directory)


def test_f19_permanent_errors_end_after_the_bound(large):
    large.faults = {ONE: Fault(times=99, status=503)}
    with pytest.raises(NetworkError, match=r"answered 503; 0 B of .* are here"):
        resolve_model(MODEL)
    assert 99 - large.faults[ONE].times == HASTE.tries


@pytest.mark.parametrize(
    ("status", "headers", "kind", "message"),
    [
        (401, {}, AccessError, r"refuses org/tiny \(401\)|not found on the hub"),
        (403, {"X-Error-Code": "GatedRepo"}, AccessError, "is gated"),
        (403, {}, AccessError, r"refuses org/tiny \(403\): you are not logged in"),
    ],
)
@pytest.mark.parametrize("where", ["faults", "head_faults"])
def test_f13_to_f15_refusals_of_one_file(large, cache, status, headers, kind, message, where):
    setattr(large, where, {ONE: Fault(times=99, status=status, headers=headers)})
    with pytest.raises(kind, match=message):
        resolve_model(MODEL)
    assert getattr(large, where)[ONE].times == 98, "a refusal is not asked for again"


def test_f13_a_file_that_the_index_names_and_nobody_has(large):
    del large.files[TWO]
    with pytest.raises(IntegrityError, match=f"names {TWO}, which is not among the model's files"):
        resolve_model(MODEL)


def test_f21_a_flipped_byte_never_gets_its_name(large, cache):
    data = large.files[TWO]
    large.served[TWO] = data[:-7] + bytes([data[-7] ^ 1]) + data[-6:]
    found = hashlib.sha256(large.served[TWO]).hexdigest()
    with pytest.raises(
        IntegrityError, match=f"{TWO} arrived with the SHA-256 {found}, .*{large.etag(TWO)}"
    ) as caught:
        resolve_model(MODEL)
    assert caught.value.exit_code == ExitCode.INTEGRITY
    assert not (blobs(cache) / large.etag(TWO)).exists()
    assert not [path for path in partials(cache) if large.etag(TWO) in path.name]
    large.served = {}
    check_whole(large, cache, resolve_model(MODEL).directory)


def test_f21_a_small_file_is_verified_by_gits_hash(large, cache):
    data = large.files["tokenizer.json"]
    large.served["tokenizer.json"] = data[:-2] + b"  "
    with pytest.raises(IntegrityError, match=f"tokenizer.json arrived with the git hash .*{git_sha1(data)}"):
        resolve_model(MODEL)
    large.served = {}
    check_whole(large, cache, resolve_model(MODEL).directory)


def test_f21_a_damaged_beginning_of_an_earlier_run_is_fetched_again(large, cache):
    large.faults = {TWO: Fault(times=99, status=503)}
    large.faults[ONE] = Fault(times=99, after_bytes=290_000)
    with pytest.raises(NetworkError):
        resolve_model(MODEL)
    (partial,) = [path for path in partials(cache) if large.etag(ONE) in path.name]
    damaged = bytearray(partial.read_bytes())
    damaged[-1000] ^= 0xFF
    partial.write_bytes(damaged)
    large.faults = {}
    notices = []
    check_whole(large, cache, resolve_model(MODEL, notices=notices).directory)
    assert f"what was there of {ONE} is damaged: fetching it again" in notices


@pytest.mark.parametrize("more", [-5, 5])
def test_f22_a_body_of_another_length(large, cache, more):
    data = large.files[TWO]
    large.served[TWO] = data[:more] if more < 0 else data + b"x" * more
    with pytest.raises(
        IntegrityError, match=f"{TWO} is sent with {len(data) + more} bytes, announced with {len(data)}"
    ):
        resolve_model(MODEL)
    assert not [path for path in partials(cache) if large.etag(TWO) in path.name and path.stat().st_size]


def test_f22_a_body_of_another_length_in_one_piece(large):
    large.has_ranges = False
    large.served[TWO] = large.files[TWO] + b"x"
    with pytest.raises(IntegrityError, match=f"{TWO} is sent with"):
        resolve_model(MODEL)


def test_f22_a_size_that_is_a_lie(large):
    large.announced[TWO] = {"X-Linked-Size": str(len(large.files[TWO]) + 100)}
    with pytest.raises(IntegrityError, match=f"{TWO} is sent with"):
        resolve_model(MODEL)


def test_f23_a_login_page_in_place_of_a_file(large):
    page = b"<html>please log in</html>"
    large.answers[ONE] = (200, {"Content-Type": "text/html"}, page)
    with pytest.raises(NetworkError, match="does not answer like a Hugging Face hub"):
        resolve_model(MODEL)


def test_f24_the_branch_moves_while_it_is_fetched(large, cache):
    """All files are of the commit that was seen first. The next run takes the new one."""
    moved = "f" * 40

    def move(name):
        if name == "config.json":
            large.answers[f"/api/models/{MODEL}"] = (
                200,
                {},
                b'{"id": "org/tiny", "sha": "%s"}' % moved.encode(),
            )

    large.on_get = move
    resolved = resolve_model(MODEL)
    assert resolved.commit == COMMIT
    check_whole(large, cache, resolved.directory)


def test_a_file_that_changes_between_two_requests(large):
    """The HEAD announced one content, the GET has another."""
    other = bytes(len(large.files[TWO]))

    def change(name):
        if name == TWO:
            large.files[TWO] = other

    large.faults = {TWO: Fault(times=1, after_bytes=100_000)}
    large.on_get = change
    with pytest.raises(IntegrityError, match=f"{TWO} changed on the hub between two requests"):
        resolve_model(MODEL)


def test_an_answer_about_another_commit(large):
    large.announced[ONE] = {"X-Repo-Commit": "e" * 40}
    with pytest.raises(
        IntegrityError, match=f"answered for {ONE} at commit {COMMIT} with one of commit eeee"
    ):
        resolve_model(MODEL)


def test_a_hash_that_could_be_a_path(large, cache):
    large.announced["config.json"] = {"ETag": '"../../../escape"'}
    with pytest.raises(NetworkError, match="does not answer like a Hugging Face hub"):
        resolve_model(MODEL)
    assert not list(cache.parent.rglob("*escape*"))


def test_f38_names_that_lead_elsewhere_are_not_fetched(large, cache):
    large.files["tokenizer/../../../escape.json"] = b"{}"
    large.files["tokenizer_extra/deep.json"] = b"{}"
    resolve_model(MODEL)
    assert not any("escape" in name or "deep" in name for name in large.fetched())


def test_f26_the_token_goes_to_the_hub_and_not_to_its_storage(large, cache, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with running(FakeHub(large.files)) as storage:
        large.storage = storage
        directory = resolve_model(MODEL).directory
        check_whole(large, cache, directory)
        assert storage.fetched() == {ONE, TWO}
        assert storage.authorized == []
        assert f"/{MODEL}/resolve/{COMMIT}/{ONE}" in large.authorized
    assert not any(b"hf_secret" in path.read_bytes() for path in cache.rglob("*") if path.is_file())


def test_redirects_without_end_and_to_no_web_address(large):
    large.answers[ONE] = (302, {"Location": "/again/" + ONE}, b"")
    with pytest.raises(NetworkError, match="it redirects more than 5 times"):
        resolve_model(MODEL)
    head = {"X-Repo-Commit": COMMIT, "X-Linked-Etag": large.etag(ONE), "X-Linked-Size": "9"}
    large.answers[ONE] = (302, head | {"Location": "file:///etc/passwd"}, b"")
    with pytest.raises(NetworkError, match="does not answer like"):
        resolve_model(MODEL)


def test_a_server_without_ranges_is_read_from_the_start_each_time(large, cache):
    large.has_ranges = False
    large.faults = {ONE: Fault(times=1, after_bytes=300_000)}
    check_whole(large, cache, resolve_model(MODEL).directory)


def test_a_server_without_ranges_that_always_breaks_is_not_asked_for_ever(large):
    large.has_ranges = False
    large.faults = {ONE: Fault(times=99, after_bytes=280_000)}
    with pytest.raises(NetworkError, match="are here"):
        resolve_model(MODEL)


def test_files_of_equal_content_side_by_side(server, cache, tmp_path):
    """Two names of one hash do not write into one partial file."""
    server.files["vocab.json"] = server.files["merges.txt"] = b"same" * 100_000
    check_whole_names = resolve_model(MODEL).directory
    assert (check_whole_names / "vocab.json").read_bytes() == (check_whole_names / "merges.txt").read_bytes()
    assert partials(cache) == []


def test_a_truncated_file_in_the_cache_is_fetched_again(large, cache):
    directory = resolve_model(MODEL).directory
    blob = (directory / ONE).resolve()
    blob.write_bytes(blob.read_bytes()[:-10])
    check_whole(large, cache, resolve_model(MODEL).directory)


def test_partial_files_of_other_contents_are_swept_at_the_end(large, cache):
    blobs(cache).mkdir(parents=True)
    (blobs(cache) / f"{'a' * 64}.12345678.subspec.incomplete").write_bytes(b"old")
    check_whole(large, cache, resolve_model(MODEL).directory)


def test_where_links_cannot_be_made_files_are_copied(large, cache, monkeypatch):
    def refuse(*args):
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "symlink", refuse)
    directory = resolve_model(MODEL).directory
    open_checkpoint(directory)
    assert not (directory / ONE).is_symlink()
    assert source_model.find_source_directory(MODEL, COMMIT) == directory


def test_a_link_in_place_of_a_partial_file_is_not_followed(large, cache, tmp_path):
    with opened(MODEL) as found:
        assert not found.weight_downloads.is_complete
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    partial = partials(cache)[0]
    partial.unlink()
    partial.symlink_to(victim)
    with pytest.raises(ResourceError, match=r"cannot write .*ELOOP"):
        resolve_model(MODEL)
    assert victim.read_bytes() == b"mine"


def test_f39_a_link_out_of_the_cache_is_refused(large, tmp_path):
    directory = resolve_model(MODEL).directory
    outside = tmp_path / "outside"
    outside.write_bytes(large.files[ONE])
    (directory / ONE).unlink()
    (directory / ONE).symlink_to(outside)
    with pytest.raises(IntegrityError, match=f"{ONE} .*is a link to .*outside"):
        resolve_model(MODEL)


def test_f28_a_read_only_cache_that_is_complete_is_used(large, cache, monkeypatch):
    directory = resolve_model(MODEL).directory

    def refuse(*args, **more):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        for name in ("mkdir", "symlink", "replace"):
            patch.setattr(os, name, refuse)
        assert resolve_model(MODEL).directory == directory
    (directory / ONE).unlink()
    (blobs(cache) / large.etag(ONE)).unlink()

    def open_to_read(path, flags, mode=0o777, real=os.open):
        return refuse() if flags & os.O_CREAT else real(path, flags, mode)

    monkeypatch.setattr(os, "open", open_to_read)
    with pytest.raises(ResourceError, match=r"cannot write .*EROFS"):
        resolve_model(MODEL)


def test_f52_a_full_disk_while_downloading_keeps_what_came(large, cache, monkeypatch):
    written = []

    def write(handle, data, real=os.write):
        written.append(len(data))
        if sum(written) > 500_000:
            raise OSError(28, "No space left on device")
        return real(handle, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(ResourceError, match=r"cannot write .*ENOSPC.* needed, .* free") as caught:
            resolve_model(MODEL)
    assert "HF_HOME" in caught.value.hint
    assert sum(path.stat().st_size for path in partials(cache)) > 0
    check_whole(large, cache, resolve_model(MODEL).directory)


def test_disk_for_the_download_and_the_substitutes_is_asked_for_first(large, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1 << 20}))
    with pytest.raises(
        ResourceError, match=r"org/tiny \(download .*, substitutes 16.* MiB\) needs .* has 1.00 MiB free"
    ):
        run(MODEL)
    assert large.sent_bytes < 2 * 262_144 + 50_000, "only headers and small files"


def test_layers_are_made_while_others_are_still_on_their_way(large):
    """The last shard is held back until the first layer has been made of the first one."""
    with opened(MODEL):
        pass  # the headers are cached now, so the next request is for the rest
    made, seen = threading.Event(), []

    def hold(name):
        assert name != TWO or made.wait(20)

    def watch(state):
        seen.append((state.done_layers, state.download.done_files))
        if state.done_layers:
            made.set()

    large.on_get = hold
    prepared = run(MODEL, progress=watch, retry_policy=RetryPolicy(stall_s=20))
    assert len(prepared.manifest.layers) == LAYERS
    assert (1, 1) in seen
    assert seen[-1] == (LAYERS, 2)


def test_result_is_that_of_a_local_preparation(large, tmp_path):
    local = content(run(resolve_model(str(tmp_path / "large"))).directory)
    remote = content(run(MODEL).directory)
    assert {name: data for name, data in local.items() if name.startswith("layer")} == {
        name: data for name, data in remote.items() if name.startswith("layer")
    }


def test_a_failed_download_ends_the_preparation_and_a_rerun_finishes_it(large, cache):
    large.faults = {TWO: Fault(times=99, after_bytes=300_000)}
    large.has_ranges = False
    with pytest.raises(NetworkError, match=f"of {TWO} are here"):
        run(MODEL)
    large.faults = {}
    large.has_ranges = True
    prepared = run(MODEL)
    assert len(prepared.manifest.layers) == LAYERS
    check_whole(large, cache, cache / "models--org--tiny" / "snapshots" / COMMIT)


def test_a_second_download_waits_for_the_first(large, cache):
    """Two processes fetch one model: nothing is fetched twice."""
    code = (
        "import sys, threading; sys.path[:0] = sys.argv[1:3]\n"
        "from fakes_store import resolve_model; notices = []\n"
        "resolve_model('org/tiny', notices=notices); print(notices)"
    )
    root = Path(__file__).parent
    large.bytes_per_s = 4e5
    environment = {
        **os.environ,
        "HF_ENDPOINT": large.url,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_XET": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(root), str(root.parent)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    message = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted("waiting: another process" in text for text in message) == [False, True]
    assert large.sent_bytes < 1.05 * sum(map(len, large.files.values()))
    for name in (ONE, TWO):
        assert sha256_file(blobs(cache) / large.etag(name)) == large.etag(name)


def test_ctrl_c_leaves_at_once_although_the_hub_is_silent(large):
    with opened(MODEL):
        pass
    large.faults = {TWO: Fault(times=99, after_bytes=0, stall_s=3)}
    with opened(MODEL, retry_policy=RetryPolicy(stall_s=30)) as found:
        found.weight_downloads.start()
        found.weight_downloads.wait()
        started_s = time.monotonic()
    assert time.monotonic() - started_s < 2


def test_two_downloads_where_locks_do_not_work(large, cache, monkeypatch):
    """Both have one process id, and fetch at the same time. Neither writes into the other's partial file."""
    import fcntl

    monkeypatch.setattr(fcntl, "flock", lambda handle, how: None)
    monkeypatch.setattr(os, "getpid", lambda: 7)
    large.bytes_per_s = 4e6
    large.faults = {ONE: Fault(times=3, after_bytes=100_000), TWO: Fault(times=2, after_bytes=50_000)}
    faults, writing = [], set()

    def fetch(delay_s):
        try:
            time.sleep(delay_s)
            check_whole_files(large, resolve_model(MODEL).directory)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=fetch, args=(number * 0.05,)) for number in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        writing |= {path.name for path in partials(cache) if path.name.startswith(large.etag(TWO))}
        time.sleep(0.005)
    assert faults == []
    assert len(writing) > 1
    check_whole(large, cache, cache / "models--org--tiny" / "snapshots" / COMMIT)


def test_what_a_killed_container_left_is_copied_and_not_written_to(large, cache):
    """Its process id says nothing here, so it may still live; what it has is not fetched again."""
    blobs(cache).mkdir(parents=True)
    tag = hashlib.sha256(TWO.encode()).hexdigest()[:8]
    left = blobs(cache) / f"{large.etag(TWO)}.{tag}.1.12345678.{'0' * 16}.subspec.incomplete"
    left.write_bytes(large.files[TWO][:290_000])
    directory = resolve_model(MODEL).directory
    check_whole_files(large, directory)
    assert [asked for name, asked in large.ranges if name == TWO] == [
        f"bytes=290000-{len(large.files[TWO]) - 1}"
    ]
    assert left.read_bytes() == large.files[TWO][:290_000]
    os.utime(left, (5, 5))
    (directory / ONE).unlink()
    resolve_model(MODEL)
    assert partials(cache) == []


def test_a_partial_file_that_somebody_cuts_gets_no_name(tmp_path):
    """All bytes came and were hashed, but they are not on the disk."""
    digest = ContentDigest("a" * 64, 100)
    (tmp_path / "partial").write_bytes(bytes(100))
    digest.update(bytes(100), 0)
    digest.hexdigest_of(tmp_path / "partial")
    os.truncate(tmp_path / "partial", 60)
    with pytest.raises(IntegrityError, match="has 60 bytes, expected 100"):
        digest.hexdigest_of(tmp_path / "partial")
