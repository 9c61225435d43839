"""`subspec models`: list, verify, find and remove prepared models."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subspec_cli.cli.models_table import fitted_table, label, tab_rows
from subspec_cli.cli.options import DebugOpt, JsonOpt
from subspec_cli.errors import DamageFoundError, UsageError
from subspec_cli.units import format_bytes

if TYPE_CHECKING:
    from subspec_cli.cli.output import Output
    from subspec_cli.cli.output_progress import ProgressLine
    from subspec_cli.substitutes.integrity import Finding, Verifier, VerifyProgress
    from subspec_cli.substitutes.inventory import StoredModel

models = typer.Typer(name="models", help="List, verify, find and remove what prepare wrote.")

ModelArg = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hub id, directory or demo, as it was prepared.")
]
OptionalModelArg = Annotated[
    str | None, typer.Argument(metavar="[MODEL]", help="One model.", show_default="all that are prepared")
]


@models.command("list")
def list_models(as_json: JsonOpt = False, _debug: DebugOpt = False) -> None:
    """Show every prepared model: which, how, how large, complete or not, and when it was last used.

    In a pipe nothing is cut: tabs separate the columns, and sizes are in bytes.
    """
    from subspec_cli.cli.output import Output
    from subspec_cli.substitutes.inventory import list_stored

    output, stored = Output(), list_stored()
    if as_json:
        output.document({"models": [stored_values(item) for item in stored]})
    elif not stored:
        output.note("no model is prepared yet; subspec prepare demo does the one that is shipped")
    elif output.is_terminal:
        output.table(*fitted_table(stored, output.out.width))
    else:
        output.tab_separated(tab_rows(stored))


@models.command()
def path(model: ModelArg, as_json: JsonOpt = False, _debug: DebugOpt = False) -> None:
    """Write the directory of MODEL's substitutes, the one that run takes."""
    from subspec_cli.cli.output import Output
    from subspec_cli.substitutes.prepared_model import find_prepared

    found = find_prepared(model)
    if as_json:
        source = found.manifest.source_directory
        document = {
            "model": found.manifest.model_id,
            "directory": found.directory,
            "source_directory": source,
        }
        Output().document(document)
    else:
        Output().result(str(found.directory))


@models.command()
def verify(
    model: OptionalModelArg = None,
    repair: Annotated[bool, typer.Option("--repair", help="Make again what is damaged, only that.")] = False,
    as_json: JsonOpt = False,
    _debug: DebugOpt = False,
) -> None:
    """Hash every prepared file and the 16-bit layers again, and name each one that is damaged."""
    from subspec_cli.cli.output import Output
    from subspec_cli.cli.output_progress import ProgressLine
    from subspec_cli.hub.command_hints import repair_command
    from subspec_cli.substitutes.integrity import Verifier
    from subspec_cli.substitutes.inventory import find_stored, list_stored

    output = Output()
    stored = list_stored() if model is None else find_stored(model)
    with ProgressLine(output) as progress:
        verifier = Verifier(stored, lambda state: progress.update(progress_text(state), *_done(state)))
        results = [_verify_set(item, verifier, output, progress, repair=repair) for item in stored]
    if as_json:
        sets = [
            {**stored_values(item), "findings": [_finding_values(one) for one in found]}
            for item, found in results
        ]
        output.document({"models": sets})
    damaged = len({finding.path for _, found in results for finding in found if finding.is_damage})
    if damaged:
        count = "1 file is" if damaged == 1 else f"{damaged} files are"
        restore = "put the named files back as they were, or remove the set and prepare the model again"
        raise DamageFoundError(f"{count} damaged", restore if repair else repair_command(model))
    if not as_json:
        sound = sum(not found for _, found in results)
        output.result(f"{sound} of {len(results)} prepared models are as they were written")


@models.command()
def remove(
    model: ModelArg,
    all_but_latest: Annotated[
        bool, typer.Option("--all-but-latest", help="Keep the set that run takes.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Remove also what a run uses now.")] = False,
    as_json: JsonOpt = False,
    _debug: DebugOpt = False,
) -> None:
    """Delete MODEL's substitutes, after asking; its 16-bit weights are never touched."""
    from subspec_cli.cli.output import Output
    from subspec_cli.substitutes.inventory import all_but_latest as older
    from subspec_cli.substitutes.inventory import find_stored, refuse_used, remove_stored

    output = Output()
    stored = find_stored(model)
    chosen = older(stored) if all_but_latest else stored
    for item in chosen:
        output.note(f"{item.directory}: {format_bytes(item.size_bytes)}, {label(item)}, {item.state}")
    if chosen and not yes and not _confirm_removal(output, chosen, as_json=as_json):
        output.note("nothing was removed")
        return
    if not force:
        refuse_used(chosen)
    freed_bytes = sum(remove_stored(item) for item in chosen)
    if as_json:
        removed = [str(item.directory) for item in chosen]
        output.document({"removed": removed, "freed_bytes": freed_bytes})
    else:
        count = f"{len(chosen)} set{'' if len(chosen) == 1 else 's'}"
        output.result(f"removed {count} of substitutes, {format_bytes(freed_bytes)} are free again")


def stored_values(stored: StoredModel) -> dict[str, Any]:
    """One set of substitutes as plain values for JSON."""
    manifest, used_s = stored.manifest, stored.last_used_s
    settings, target = manifest.settings if manifest else None, stored.target()
    return {
        "model": stored.model_id,
        "revision": manifest.commit if manifest else None,
        "bits": settings.bits if settings else None,
        "optimizer": settings.optimizer if settings else None,
        "overrides": dict(settings.overrides) if settings else None,
        "state": stored.state,
        "problem": stored.problem,
        "layers": len(manifest.layers) if manifest else None,
        "target_bytes": target.size_bytes if target else None,
        "target_bits": target.bits if target else None,
        "has_residuals": stored.has_residuals,
        "substitute_bytes": stored.size_bytes,
        "last_used": None if used_s is None else datetime.fromtimestamp(used_s, UTC).isoformat(),
        "directory": stored.directory,
        "source_directory": manifest.source_directory if manifest else None,
    }


def progress_text(state: VerifyProgress) -> str:
    """The model being hashed, bytes, rate and time left."""
    from subspec_cli.cli.output_progress import rate_text, time_left

    parts = [f"verifying {state.model_id}"]
    parts.append(f"{format_bytes(state.done_bytes)} of {format_bytes(state.total_bytes)}")
    if state.elapsed_s > 0:
        parts.append(rate_text(state.done_bytes / state.elapsed_s))
    parts.append(time_left(state.done_bytes, state.total_bytes, state.elapsed_s))
    return " · ".join(part for part in parts if part)


def _done(state: VerifyProgress) -> tuple[int, int]:
    return state.done_bytes, state.total_bytes


def _verify_set(
    stored: StoredModel, verifier: Verifier, output: Output, progress: ProgressLine, *, repair: bool
) -> tuple[StoredModel, list[Finding]]:
    """Verify a set and print its findings; with `repair`, repair it and return the findings that remain."""
    findings = verifier.verify(stored)
    if stored.state == "partial":
        output.note(
            f"{stored.model_id}, {label(stored)}: not done yet; the same subspec prepare goes on with it"
        )
    for finding in findings:
        output.note(finding.text, style="bold")
    if not findings or not repair:
        return stored, findings
    progress.update(f"repairing {stored.model_id}: loading the quantizer")
    from subspec_cli.cli.prepare import progress_text as repair_text
    from subspec_cli.session.prepare import repair as repair_set
    from subspec_cli.substitutes.integrity import Verifier
    from subspec_cli.substitutes.inventory import reread

    repair_set(stored, findings, lambda state: progress.update(repair_text(state)))
    again = reread(stored)
    left = Verifier([again], lambda state: progress.update(progress_text(state))).verify(again)
    for finding in left:
        output.note(f"still {finding.text}", style="bold")
    if not left:
        output.note(f"repaired {stored.model_id}, {label(stored)}")
    return again, left


def _confirm_removal(output: Output, chosen: list[StoredModel], *, as_json: bool) -> bool:
    if as_json or not (sys.stdin and sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("removing needs a yes, and there is no terminal to ask on", "--yes does not ask")
    size = format_bytes(sum(item.size_bytes for item in chosen))
    try:
        return output.ask(f"free {size}? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _finding_values(finding: Finding) -> dict[str, Any]:
    return {
        "file": finding.path,
        "what": finding.what,
        "expected": finding.expected,
        "found": finding.found,
        "damaged": finding.is_damage,
    }
