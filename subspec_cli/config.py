"""Settings: each field holds the default, the range and the help text of one setting, for flag and TOML key.

A key is the flag's name with underscores. Plain data: `cli.options` makes the flags, `config_file` reads TOML.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from subspec_cli.setting_rules import (
    BIASES,
    BITS,
    BUDGET,
    DEFAULT_BITS,
    MOST_PARALLEL,
    MOST_REPLICAS,
    NAME,
    OVERRIDES,
    SIZE,
    SWITCH,
    TEXT,
    TEXTS,
    Setting,
    choice,
    number,
    setting,
    whole,
)


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and which of its prepared substitutes."""

    model: str | None = setting(
        None,
        NAME,
        "Hub id, local directory, demo, or the last name of a prepared model.",
        "MODEL",
        "the model used last",
        letter="m",
    )
    revision: str | None = setting(None, NAME, "Branch, tag or commit on the hub.", "REV")
    """None takes the prepared one."""
    bits: int | None = setting(None, BITS, "Use the substitutes prepared with these bits.", "4|8|2")
    """None takes what was prepared."""


@dataclass(frozen=True)
class MemoryConfig:
    """What the target, its substitutes and the caches may occupy."""

    memory_gib: float | None = setting(
        None,
        BUDGET,
        "Memory to use: the device's on cuda, RAM on cpu. 8 is 8 GiB; 500MB, 800MiB, 8GB and 1.5GiB say the unit; "
        "auto leaves what others use.",
        "SIZE",
        "auto",
        key="vram_gb",
        alias="memory_gb",
    )
    """Budget of the device. None is auto: what is free, less a reserve."""
    ram_gb: float | None = setting(
        None,
        SIZE,
        "Host memory to use, as a number of GiB or with a unit; what does not fit is read from disk.",
        "SIZE",
        "what is free",
    )
    """On a GPU the host memory beside it, on cpu all of the process."""
    device: str = setting("auto", choice("auto", "cuda", "cpu"), "Where to run.", "auto|cuda|cpu")
    """auto takes cuda if there is a GPU."""
    context: int | None = setting(
        None,
        whole(16),
        "Tokens of prompt and answer together.",
        "N",
        "what the prompt and --max-new-tokens need; in a chat up to 4096, as the budget allows",
    )
    resident_layers: int | None = setting(
        None,
        whole(0),
        "Keep N target layers in memory; 0 streams all, also when all would fit.",
        "N",
        "planned",
    )
    no_residual: bool = setting(
        False, SWITCH, "Stream 16-bit weights raw, also where residuals are prepared."
    )
    reprobe: bool = setting(
        False, SWITCH, "Time link and kernels again, in place of what was kept from an earlier run."
    )


@dataclass(frozen=True)
class DraftConfig:
    """The shape of the draft tree; None lets measured times decide."""

    depth: int | None = setting(None, whole(1, 64), "Fix the depth of the draft tree.", "D", "adaptive")
    width: int | None = setting(
        None, whole(1, 8), "Fix the width of the draft tree; 1 is a chain.", "W", "adaptive"
    )
    no_shadow: bool = setting(False, SWITCH, "Draft only between passes, not while a pass waits for weights.")
    no_speculation: bool = setting(
        False, SWITCH, "Decode plainly, one pass per token: the same tokens, slower."
    )


@dataclass(frozen=True)
class SamplingConfig:
    """How a token is chosen from the target's logits."""

    source: Literal["model", "greedy"] | None = setting(
        None,
        choice("model", "greedy"),
        "What no other flag says: generation_config.json's values, or greedy.",
        "model|greedy",
        "greedy; in a chat the model's",
        key="sampling",
    )
    """None is greedy, and in a chat the model's own values."""
    temperature: float = setting(
        0.0,
        number("a number of at least 0", lambda value: value >= 0),
        "0 takes the most likely token.",
        "T",
        letter="t",
    )
    top_p: float = setting(
        1.0,
        number("a number above 0 and at most 1", lambda value: 0 < value <= 1),
        "Sample among the most likely tokens holding this probability.",
        "P",
    )
    top_k: int = setting(0, whole(0), "Sample among the K most likely tokens; 0 takes all.", "K")
    min_p: float = setting(
        0.0,
        number("a number from 0 to 1", lambda value: 0 <= value <= 1),
        "Sample among tokens at least this share as likely as the best.",
        "P",
    )
    repetition_penalty: float = setting(
        1.0,
        number("a number above 0", lambda value: value > 0),
        "Penalty of tokens of prompt and answer, as transformers applies it; 1 is none.",
        "X",
    )
    presence_penalty: float = setting(
        0.0,
        number("a number from -100 to 100", lambda value: abs(value) <= 100),
        "Taken once from each token of the answer.",
        "X",
    )
    frequency_penalty: float = setting(
        0.0,
        number("a number from -100 to 100", lambda value: abs(value) <= 100),
        "Taken from a token for each time that it is in the answer.",
        "X",
    )
    logit_bias: tuple[tuple[str, float], ...] = setting(
        (), BIASES, 'Added to logits: JSON such as {"65": 2.5, " the": -100}, ids or tokens.', "FILE"
    )
    """By token: digits are an id, another text is itself one token."""
    seed: int | None = setting(
        None, whole(0, 2**63 - 1), "Same seed, same answer.", "S", "a fresh one, shown"
    )
    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False)
    """Fields that a flag or a file gave; a model's own values replace the others."""

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0


@dataclass(frozen=True)
class SubstituteConfig:
    """How `prepare` quantizes; `run` takes what was prepared."""

    bits: int | None = setting(None, BITS, "Bits per substitute weight.", "4|8|2", str(DEFAULT_BITS))
    """None takes those of [model], else `DEFAULT_BITS`."""
    optimizer: Literal["minmax", "hqq"] = setting(
        "minmax", choice("minmax", "hqq"), "How scales are found; hqq is slower."
    )
    """minmax takes a group's extremes, hqq searches for the smallest error."""
    residual: bool = setting(False, SWITCH, "Write residuals too, so that passes stream fewer bytes.")
    overrides: tuple[tuple[str, int], ...] = setting((), OVERRIDES)
    """Other bits for matrices, by a pattern of the name inside the layer (`mlp.down_proj`); the first pattern
    that matches is used."""


@dataclass(frozen=True)
class RunConfig:
    """What only `subspec run` takes."""

    max_new_tokens: int = setting(512, whole(1), "Longest answer.", "N", letter="n")
    stop: tuple[str, ...] = setting(
        (), TEXTS, "End the answer before this text or special token; may be given several times.", "TEXT"
    )
    system: str | None = setting(None, TEXT, "System message of the chat template.", "TEXT", letter="s")
    """None leaves it to the template."""
    raw: bool = setting(False, SWITCH, "Complete the bare text, without chat template.")
    plain: bool = setting(False, SWITCH, "The raw text, without statistics and colours, also on a terminal.")


@dataclass(frozen=True)
class BenchConfig:
    """What only `subspec bench` takes."""

    limit: int | None = setting(None, whole(1), "Questions to run, over all categories.", "N", "all")
    max_new_tokens: int = setting(128, whole(1), "Longest answer of each turn.", "N", letter="n")
    plain_tokens: int | None = setting(
        None, whole(1), "Longest answer of the plain arm, the slow one.", "K", "as --max-new-tokens"
    )
    repeat: int = setting(1, whole(1), "Times to ask every question; figures are medians.", "N")
    questions: str | None = setting(None, NAME, "The suite's questions from a local file.", "FILE")
    """None takes the suite's own."""
    resume: str | None = setting(None, NAME, "Continue an interrupted record, which is updated.", "FILE")
    peer: str | None = setting(
        None,
        choice("accelerate"),
        "Measure the library's own offload beside, in the same budget.",
        "accelerate",
    )
    plot: str | None = setting(None, NAME, "Draw the figures as FILE.png or FILE.svg.", "FILE")


@dataclass(frozen=True)
class AuditConfig:
    """What only `subspec audit` takes."""

    tokens: int = setting(24, whole(1), "Longest answer.", "N")
    limit: int | None = setting(None, whole(1), "Questions to answer, over all categories.", "N", "all")
    questions: str | None = setting(
        None, NAME, "Questions from a local JSON lines file, as MT-Bench's.", "FILE", "the shipped sample"
    )
    """None takes the shipped sample."""


@dataclass(frozen=True)
class ServeConfig:
    """What only `subspec serve` takes."""

    host: str = setting("127.0.0.1", NAME, "Address to listen on.", "ADDRESS")
    port: int = setting(8000, whole(0, 65535), "Port to listen on; 0 takes a free one.", "PORT")
    api_key: str | None = setting(
        None,
        NAME,
        "Key that requests must bring; SUBSPEC_API_KEY in the environment is safer.",
        "KEY",
        "none",
    )
    anyone: bool = setting(False, SWITCH, "Answer without a key also where other machines reach the server.")
    parallel: int = setting(
        1, whole(1, MOST_PARALLEL), "Answers at a time, each with a context of its own.", "N"
    )
    queue: int = setting(64, whole(0, 100_000), "Most answers that wait; more are refused.", "N")
    allowed_host: tuple[str, ...] = setting(
        (), TEXTS, "A name of this server beside its addresses; may be given several times.", "NAME"
    )
    cors_origin: tuple[str, ...] = setting(
        (), TEXTS, "Let pages of this origin ask; may be given several times.", "ORIGIN"
    )
    grace_s: int = setting(30, whole(0, 3600), "Time to finish answers when asked to stop.", "S")
    ray: str | None = setting(
        None,
        NAME,
        "Serve replicas on Ray Serve: local starts Ray for the command, auto or HOST:PORT joins a cluster.",
        "local|auto|HOST:PORT",
        "one process",
    )
    replicas: int | None = setting(
        None, whole(1, MOST_REPLICAS), "Replicas on Ray.", "N", "one for each GPU, on cpu for each node"
    )


@dataclass(frozen=True)
class BatchConfig:
    """What only `subspec batch` takes."""

    parallel: int = setting(
        4, whole(1, MOST_PARALLEL), "Answers at a time, each with a context of its own.", "N"
    )
    ray: str | None = setting(
        None,
        NAME,
        "Spread the job over replicas on Ray: local starts one for the command, auto or HOST:PORT joins a cluster.",
        "local|auto|HOST:PORT",
        "one process",
    )
    replicas: int | None = setting(
        None, whole(1, MOST_REPLICAS), "Replicas on Ray.", "N", "one for each GPU, on cpu for each node"
    )


def _panel(title: str) -> dict[str, str]:
    return {"panel": title}


@dataclass(frozen=True)
class Config:
    """All settings, resolved. A field is a section of the file; its panel is the heading in `--help`."""

    model: ModelConfig = ModelConfig()
    memory: MemoryConfig = field(default=MemoryConfig(), metadata=_panel("Memory and device"))
    draft: DraftConfig = field(default=DraftConfig(), metadata=_panel("Speculation"))
    sampling: SamplingConfig = field(default=SamplingConfig(), metadata=_panel("Sampling"))
    substitute: SubstituteConfig = SubstituteConfig()
    run: RunConfig = RunConfig()
    bench: BenchConfig = BenchConfig()
    audit: AuditConfig = AuditConfig()
    batch: BatchConfig = BatchConfig()
    serve: ServeConfig = field(default=ServeConfig(), metadata=_panel("Server"))

    def as_dict(self) -> dict[str, Any]:
        """Sections of plain values by key, for JSON."""
        values = {
            section: {
                setting.key: getattr(getattr(self, section), name)
                for name, setting in settings_of(section_type).items()
            }
            for section, section_type in SECTIONS.items()
        }
        values["run"]["stop"] = list(self.run.stop)
        values["substitute"]["overrides"] = dict(self.substitute.overrides)
        for name in ("allowed_host", "cors_origin"):
            values["serve"][name] = list(values["serve"][name])
        values["serve"]["api_key"] = None if self.serve.api_key is None else "…"  # a record may be published
        values["sampling"]["logit_bias"] = dict(self.sampling.logit_bias)
        return values


SECTIONS: Final[dict[str, type[Any]]] = {
    entry.name: type(entry.default) for entry in dataclasses.fields(Config)
}


def settings_of(section: type[Any]) -> dict[str, Setting]:
    """The settings of a section by field name."""
    entries = [entry for entry in dataclasses.fields(section) if "setting" in entry.metadata]
    found = {entry.name: entry.metadata["setting"] for entry in entries}
    return {name: setting._replace(key=setting.key or name) for name, setting in found.items()}


def flag_of(key: str) -> str:
    """The flag of a key: vram_gb has --vram-gb."""
    return f"--{key.replace('_', '-')}"
