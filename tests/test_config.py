"""Settings: defaults, precedence, and one clear sentence for everything that cannot be used."""

import json
from pathlib import Path

import pytest

from subspec_cli.config import Config
from subspec_cli.config_file import find_config_file, read_config_file, resolve_config, user_config_file
from subspec_cli.errors import ExitCode, UsageError
from subspec_cli.units import GIB, SIZE_WORDS

PRESETS = sorted((Path(__file__).parent.parent / "subspec_cli" / "presets").glob("*.toml"))


@pytest.fixture
def toml(tmp_path):
    def write(text):
        path = tmp_path / "settings.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_a_home_that_may_not_be_read_has_no_settings(tmp_path, monkeypatch):
    def refused(self, **how):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "stat", refused)
    assert find_config_file(None) is None


def test_defaults_are_greedy_and_json_able():
    config = resolve_config({})
    assert config == Config()
    assert config.sampling.is_greedy
    assert not resolve_config({"sampling": {"temperature": 0.7}}).sampling.is_greedy
    document = json.loads(json.dumps(config.as_dict()))
    assert list(document) == [
        "model",
        "memory",
        "draft",
        "sampling",
        "substitute",
        "run",
        "bench",
        "audit",
        "batch",
        "serve",
    ]
    assert document["run"] == {
        "max_new_tokens": 512,
        "system": None,
        "stop": [],
        "raw": False,
        "plain": False,
    }
    assert document["bench"]["max_new_tokens"] == 128
    assert resolve_config({"serve": {"api_key": "secret"}}).as_dict()["serve"]["api_key"] == "…"
    assert document["substitute"] == {
        "bits": None,
        "optimizer": "minmax",
        "overrides": {},
        "residual": False,
    }


def test_flag_wins_over_file_and_file_over_default(toml):
    path = toml("[run]\nmax-new-tokens = 7\nstop = ['END']\n[memory]\nmemory_gb = 2\n[sampling]\ntop_k = 5\n")
    config = resolve_config({"run": {"max_new_tokens": 9, "system": None}}, path)
    assert config.run.max_new_tokens == 9
    assert config.run.stop == ("END",)
    assert config.memory.memory_gib == 2.0
    assert isinstance(config.memory.memory_gib, float)
    assert config.sampling.top_k == 5
    assert config.sampling.top_p == 1.0
    # The alias in the file and the flag's other name are one setting.
    assert resolve_config({"memory": {"vram_gb": 3.5}}, path).memory.memory_gib == 3.5
    assert resolve_config({"run": {"raw": False}}, toml("[run]\nraw = true\n")).run.raw is False


@pytest.mark.parametrize(
    ("written", "size_bytes"),
    [
        ("'500MB'", 500 * 10**6),
        ("'800 MiB'", 800 << 20),
        ("'1.5gib'", 3 << 29),
        ("'8GB'", 8 * 10**9),
        ("'8'", 8 * GIB),
        ("8", 8 * GIB),
    ],
)
def test_a_size_is_a_number_of_gib_or_has_a_unit(toml, written, size_bytes):
    config = resolve_config({}, toml(f"[memory]\nvram_gb = {written}\nram_gb = {written}\n"))
    assert round(config.memory.memory_gib * GIB) == round(config.memory.ram_gb * GIB) == size_bytes


BAD_FLAGS = [
    ("memory", "vram_gb", 0.0, f"--vram-gb must be {SIZE_WORDS}, or auto, not 0.0"),
    ("memory", "vram_gb", -1.0, f"--vram-gb must be {SIZE_WORDS}, or auto, not -1.0"),
    ("memory", "vram_gb", float("nan"), f"--vram-gb must be {SIZE_WORDS}, or auto, not NaN"),
    ("memory", "memory_gb", float("inf"), f"--memory-gb must be {SIZE_WORDS}, or auto, not Infinity"),
    ("memory", "vram_gb", 1e99, f"--vram-gb must be {SIZE_WORDS}, or auto, not 1e+99"),
    ("memory", "vram_gb", 10**400, f"--vram-gb must be {SIZE_WORDS}"),
    ("memory", "device", "tpu", '--device must be auto, cuda or cpu, not "tpu"'),
    ("memory", "context", 15, "--context must be a whole number of at least 16, not 15"),
    ("memory", "resident_layers", -1, "--resident-layers must be a whole number of at least 0, not -1"),
    ("model", "bits", 3, "--bits must be 2, 4 or 8, not 3"),
    ("model", "bits", 4.0, "--bits must be 2, 4 or 8, not 4.0"),
    ("model", "bits", True, "--bits must be 2, 4 or 8, not true"),
    ("model", "model", " ", '--model must be a text that is not empty, not " "'),
    ("draft", "depth", 0, "--depth must be a whole number from 1 to 64, not 0"),
    ("draft", "depth", 65, "--depth must be a whole number from 1 to 64, not 65"),
    ("draft", "width", 9, "--width must be a whole number from 1 to 8, not 9"),
    ("sampling", "temperature", -0.1, "--temperature must be a number of at least 0, not -0.1"),
    ("sampling", "temperature", float("nan"), "--temperature must be a number of at least 0, not NaN"),
    ("sampling", "top_p", 0.0, "--top-p must be a number above 0 and at most 1, not 0.0"),
    ("sampling", "top_p", 1.1, "--top-p must be a number above 0 and at most 1, not 1.1"),
    ("sampling", "top_k", -1, "--top-k must be a whole number of at least 0, not -1"),
    ("sampling", "seed", -1, "--seed must be a whole number from 0 to 9223372036854775807, not -1"),
    ("run", "max_new_tokens", 0, "--max-new-tokens must be a whole number of at least 1, not 0"),
    ("run", "stop", ["a", ""], '--stop must be a list of texts, none of them empty, not ["a", ""]'),
    ("bench", "limit", 0, "--limit must be a whole number of at least 1, not 0"),
    ("bench", "plain_tokens", 0, "--plain-tokens must be a whole number of at least 1, not 0"),
]


@pytest.mark.parametrize(("section", "key", "value", "message"), BAD_FLAGS)
def test_bad_flag_is_named_with_its_range(section, key, value, message):
    with pytest.raises(UsageError) as caught:
        resolve_config({section: {key: value}})
    assert caught.value.message.startswith(message)
    assert caught.value.exit_code == ExitCode.USAGE


def test_two_names_of_one_setting():
    with pytest.raises(UsageError, match="--memory-gb: given twice") as caught:
        resolve_config({"memory": {"vram_gb": 1.0, "memory_gb": 2.0}})
    assert caught.value.hint == "--vram-gb and --memory-gb say the same thing; give one"


BAD_FILES = [
    (
        "[run]\nmax_new_token = 5",
        "run.max_new_token = 5: unknown key",
        "did you mean max_new_tokens? keys of [run]",
    ),
    ("[draft]\nmax_dept = 5", "draft.max_dept = 5: unknown key", "did you mean depth? keys of [draft]"),
    ("[run]\ntemperature = 0.5", "run.temperature = 0.5: unknown key", "temperature belongs in [sampling]"),
    ("[run]\ntop-p = 0.5", "run.top-p = 0.5: unknown key", "top_p belongs in [sampling]"),
    ("[run]\nzzz = 1", "run.zzz = 1: unknown key", "keys of [run]: max_new_tokens stop system raw plain"),
    ("[memroy]\nvram_gb = 8", "unknown section [memroy]", "did you mean memory? sections: model memory"),
    ("vram_gb = 8", "vram_gb = 8 stands outside any section", "vram_gb belongs in [memory]"),
    ("vram = 8", "vram = 8 stands outside any section", "did you mean vram_gb? keys:"),
    ("memory = 8", "memory = 8 must be a section", "write [memory] on a line of its own"),
    ("[[memory]]\nvram_gb = 8", 'memory = [{"vram_gb": 8}] must be a section', "write [memory]"),
    ("[memory]\nvram_gb = '8 apples'", 'memory.vram_gb = "8 apples" must be a size', "the flag --vram-gb"),
    (
        "[memory]\nvram_gb = true",
        f"memory.vram_gb = true must be {SIZE_WORDS}",
        "the flag --vram-gb",
    ),
    ("[memory]\nvram_gb = nan", f"memory.vram_gb = NaN must be {SIZE_WORDS}", "the flag --vram-gb"),
    ("[memory]\nvram_gb=1\nmemory_gb=2", "memory.memory_gb = 2: given twice", "say the same thing"),
    ("[run]\ntop_k = 1", "run.top_k = 1: unknown key", "top_k belongs in [sampling]"),
    ("[run]\nraw = 1", "run.raw = 1 must be true or false", "the flag --raw"),
    ("[run]\nsystem = 1", "run.system = 1 must be a text", "the flag --system"),
    (
        "[run]\nstop = 'END'",
        'run.stop = "END" must be a list of texts, none of them empty',
        "the flag --stop",
    ),
    ("[run]\nstop = [1]", "run.stop = [1] must be a list of texts, none of them empty", "the flag --stop"),
    ("[run]\nmax_new_tokens = 1.0", "run.max_new_tokens = 1.0 must be a whole number", "--max-new-tokens"),
    ("[sampling]\nseed = 1979-05-27", 'sampling.seed = "1979-05-27" must be a whole number', "--seed"),
    ("[memory]\ndevice = ['cpu']", 'memory.device = ["cpu"] must be auto, cuda or cpu', "--device"),
    (f"[model]\nmodel = '{'x' * 99}'\nbits = 5", "model.bits = 5 must be 2, 4 or 8", "--bits"),
    (f"[model]\nbits = '{'x' * 99}'", f'model.bits = "{"x" * 56}... must be 2, 4 or 8', "--bits"),
    (
        "[substitute.overrides]\n'*.down_proj' = 3",
        'substitute.overrides = {"*.down_proj": 3} must be a table of 2, 4 or 8 bits by name pattern',
        "",
    ),
    ("[substitute]\noverrides = 8", "substitute.overrides = 8 must be a table of 2, 4 or 8 bits", ""),
    ("[substitute.overrides]\n' ' = 8", 'substitute.overrides = {" ": 8} must be a table', ""),
    ("[substitute.overrides]\na.b = 8", 'substitute.overrides = {"a": {"b": 8}} must be a table', ""),
    ("[substitute.overides]\na = 8", 'substitute.overides = {"a": 8}: unknown key', "mean overrides?"),
    (
        "[substitute]\noptimizer = 'adam'",
        'substitute.optimizer = "adam" must be minmax or hqq',
        "--optimizer",
    ),
    ("a = \n[b", "bad TOML at line 1, column 5: Invalid value", ""),
    ("[run]\nstop = ['a'", "bad TOML at line 2, column 12: Unclosed array", ""),
    ("[run]\n[run]", "bad TOML at line 2, column 5", ""),
    (b"a = '\xff'", "not UTF-8 at byte 5", "save the file as UTF-8"),
    ("a = " + "[" * 5000, "bad TOML: nested too deeply", ""),
    (b"#" * ((1 << 20) + 1), "larger than 1 MiB", ""),
]


@pytest.mark.parametrize(("text", "message", "hint"), BAD_FILES)
def test_bad_file_names_file_key_value_and_remedy(toml, text, message, hint):
    path = toml(text)
    with pytest.raises(UsageError) as caught:
        resolve_config({}, path)
    assert caught.value.message.startswith(f"{path}: {message}")
    assert hint in caught.value.hint
    assert caught.value.exit_code == ExitCode.USAGE


def test_bits_by_name_pattern_keep_the_order_of_the_file(toml):
    path = toml(
        "[substitute]\nbits = 4\noptimizer = 'hqq'\n[substitute.overrides]\n'*.v_*' = 8\n'mlp*' = 2\n"
    )
    found = resolve_config({"substitute": {"bits": 2}}, path).substitute
    assert (found.bits, found.optimizer, found.overrides) == (2, "hqq", (("*.v_*", 8), ("mlp*", 2)))


def test_unreadable_file(tmp_path):
    with pytest.raises(UsageError, match=r"config file .*absent\.toml: No such file or directory"):
        read_config_file(tmp_path / "absent.toml")
    with pytest.raises(UsageError, match=r"config file .*: Is a directory"):
        read_config_file(tmp_path)


def test_byte_order_mark_is_no_error(toml):
    assert resolve_config({}, toml(b"\xef\xbb\xbf[sampling]\nseed = 3\n")).sampling.seed == 3


def test_where_the_file_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert find_config_file(None) is None
    own = tmp_path / "xdg" / "subspec" / "config.toml"
    own.parent.mkdir(parents=True)
    own.write_text("[sampling]\nseed = 1\n")
    assert find_config_file(None) == own
    Path("subspec.toml").write_text("[sampling]\nseed = 2\n")
    assert find_config_file(None) == Path("subspec.toml")
    assert find_config_file("other.toml") == Path("other.toml")


@pytest.mark.parametrize(
    ("platform", "folder"),
    [
        ("linux", ".config"),
        ("darwin", "Library/Application Support"),
        ("win32", "AppData/Roaming"),
    ],
)
def test_user_config_on_each_platform(monkeypatch, platform, folder):
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative/is/ignored")
    assert user_config_file() == Path("/home/ann") / folder / "subspec" / "config.toml"


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_preset_loads(path):
    config = resolve_config({}, path)
    assert config.model.model
    assert config.memory.memory_gib


def test_presets_of_the_paper():
    found = {path.stem: resolve_config({}, path) for path in PRESETS}
    assert set(found) == {"demo", "laptop-cpu", "qwen2.5-7b-8gb", "qwen2.5-14b-12gb", "qwen2.5-32b-24gb"}
    for size, gib in (("7B", 8), ("14B", 12), ("32B", 24)):
        config = found[f"qwen2.5-{size.lower()}-{gib}gb"]
        assert config.model.model == f"Qwen/Qwen2.5-{size}-Instruct"
        assert (config.memory.device, config.memory.memory_gib, config.memory.context) == (
            "cuda",
            gib - 1,
            2048,
        )
