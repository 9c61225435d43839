"""The options that commands share. None means not given: the config file, then the default, decide.

Ranges are checked with the config file's (`subspec_cli.config`), so each is written once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from subspec_cli.config import Config

DEFAULTS = Config()
_MEMORY, _DRAFT, _SAMPLING = "Memory and device", "Speculation", "Sampling"


def number(text: str) -> float:
    """A number, or an error that shows what was written."""
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a number") from error


def whole(text: str) -> int:
    """A whole number, or an error that shows what was written."""
    try:
        return int(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a whole number") from error


ModelOpt = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="Hub id, local directory or [bold]demo[/bold].",
        show_default="the model prepared last",
    ),
]
RevisionOpt = Annotated[
    str | None, typer.Option("--revision", metavar="REV", help="Branch, tag or commit on the hub.")
]
BitsOpt = Annotated[
    int | None,
    typer.Option(
        "--bits", parser=whole, metavar="4|8|2", help="Use the substitutes prepared with these bits."
    ),
]
ConfigOpt = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="TOML settings; flags win over them.",
        show_default="subspec.toml, else the user's config.toml",
    ),
]
VramOpt = Annotated[
    float | None,
    typer.Option(
        "--vram-gb",
        parser=number,
        metavar="GIB",
        help="Memory to use, in GiB: the device's on cuda, RAM on cpu.",
        rich_help_panel=_MEMORY,
    ),
]
MemoryOpt = Annotated[
    float | None,
    typer.Option(
        "--memory-gb", parser=number, metavar="GIB", help="The same as --vram-gb.", rich_help_panel=_MEMORY
    ),
]
RamOpt = Annotated[
    float | None,
    typer.Option(
        "--ram-gb",
        parser=number,
        metavar="GIB",
        help="Host memory to use, in GiB; what does not fit is read from disk.",
        show_default="what is free",
        rich_help_panel=_MEMORY,
    ),
]
DeviceOpt = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="auto|cuda|cpu",
        help="Where to run.",
        show_default=DEFAULTS.memory.device,
        rich_help_panel=_MEMORY,
    ),
]
ContextOpt = Annotated[
    int | None,
    typer.Option(
        "--context",
        parser=whole,
        metavar="N",
        help="Tokens of prompt and answer together.",
        show_default="up to 4096, as the budget allows",
        rich_help_panel=_MEMORY,
    ),
]
ResidentOpt = Annotated[
    int | None,
    typer.Option(
        "--resident-layers",
        parser=whole,
        metavar="N",
        help="Keep N target layers in memory; 0 streams all, also when all would fit.",
        show_default="planned",
        rich_help_panel=_MEMORY,
    ),
]
ReprobeOpt = Annotated[
    bool | None,
    typer.Option(
        "--reprobe/--no-reprobe",
        help="Time link and kernels anew, in place of what was kept from an earlier run.",
        show_default=False,
        rich_help_panel=_MEMORY,
    ),
]
DepthOpt = Annotated[
    int | None,
    typer.Option(
        "--depth",
        parser=whole,
        metavar="D",
        help="Fix the depth of the draft tree.",
        show_default="adaptive",
        rich_help_panel=_DRAFT,
    ),
]
WidthOpt = Annotated[
    int | None,
    typer.Option(
        "--width",
        parser=whole,
        metavar="W",
        help="Fix the width of the draft tree; 1 is a chain.",
        show_default="adaptive",
        rich_help_panel=_DRAFT,
    ),
]
ShadowOpt = Annotated[
    bool | None,
    typer.Option(
        "--no-shadow/--shadow",
        help="Draft only between passes, not while a pass waits for weights.",
        show_default=False,
        rich_help_panel=_DRAFT,
    ),
]
SpeculationOpt = Annotated[
    bool | None,
    typer.Option(
        "--no-speculation/--speculation",
        help="Decode plainly, one pass per token: the same tokens, slower.",
        show_default=False,
        rich_help_panel=_DRAFT,
    ),
]
TemperatureOpt = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        parser=number,
        metavar="T",
        help="0 takes the most likely token.",
        show_default=f"{DEFAULTS.sampling.temperature:g}",
        rich_help_panel=_SAMPLING,
    ),
]
TopPOpt = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        parser=number,
        metavar="P",
        help="Sample among the most likely tokens holding this probability.",
        show_default=f"{DEFAULTS.sampling.top_p:g}",
        rich_help_panel=_SAMPLING,
    ),
]
TopKOpt = Annotated[
    int | None,
    typer.Option(
        "--top-k",
        parser=whole,
        metavar="K",
        help="Sample among the K most likely tokens; 0 takes all.",
        show_default=str(DEFAULTS.sampling.top_k),
        rich_help_panel=_SAMPLING,
    ),
]
SeedOpt = Annotated[
    int | None,
    typer.Option(
        "--seed",
        parser=whole,
        metavar="S",
        help="Same seed, same answer.",
        show_default="a fresh one, shown",
        rich_help_panel=_SAMPLING,
    ),
]
DebugOpt = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def memory_flags(
    vram_gb: float | None,
    memory_gb: float | None,
    ram_gb: float | None,
    device: str | None,
    context: int | None,
    resident_layers: int | None,
    reprobe: bool | None = None,
) -> dict[str, object]:
    """The [memory] section as flags give it."""
    budget = {"vram_gb": vram_gb, "memory_gb": memory_gb, "ram_gb": ram_gb}
    layers = {"context": context, "resident_layers": resident_layers}
    return {**budget, **layers, "device": device, "reprobe": reprobe}


def draft_flags(
    depth: int | None, width: int | None, no_shadow: bool | None, no_speculation: bool | None
) -> dict[str, object]:
    """The [draft] section as flags give it."""
    return {"depth": depth, "width": width, "no_shadow": no_shadow, "no_speculation": no_speculation}
