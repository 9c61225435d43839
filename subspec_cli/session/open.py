"""Opening a session: heavy libraries are imported only once the model is known to be there and sound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from subspec_cli.config import SECTIONS, Config, settings_of
from subspec_cli.config_file import resolve_config
from subspec_cli.errors import UsageError
from subspec_cli.files.home import keep_compiled_loops
from subspec_cli.reporter import SILENT, Reporter
from subspec_cli.session.found_model import find_model
from subspec_cli.session.openmp import set_openmp_defaults
from subspec_cli.session.sampling_source import with_model_sampling
from subspec_cli.streaming.process_limits import check_libraries_fit

if TYPE_CHECKING:
    from subspec_cli.session.build import TokenCount
    from subspec_cli.session.machine_costs import CostSource
    from subspec_cli.session.session import Session


def load(
    model: str | None = None,
    *,
    memory_gib: float | None = None,
    reporter: Reporter = SILENT,
    **settings: object,
) -> Session:
    """Open a prepared model and return the session that answers with it; use it as a context manager.

    No settings file is read. The first load on a machine probes it, which takes some seconds.

    Args:
        model: hub id, local directory or `demo`; None takes the model used last.
        memory_gib: budget in GiB, of device memory on a GPU and of RAM on a CPU; None takes 3/4 of what is free.
        reporter: receives progress and notes; silent by default.
        settings: keys of the settings file's sections [model], [memory], [draft], [sampling] and [run], such as
            `context` (tokens of prompt and answer together), `device`, `temperature`, `top_p`, `no_speculation`,
            `max_new_tokens`, `stop` or `system`.

    Raises:
        UsageError: a setting is unknown or out of range, or the model is not prepared.
        UnsupportedModelError: the model or the device cannot be used.
        IntegrityError: files are damaged or changed.
        ResourceError: the budget is too small, or larger than the machine; or a limit of this process is too low.
    """
    flags = _by_section({"model": model, "memory_gb": memory_gib, **settings})
    return open_session(resolve_config(flags), reporter)


def open_session(
    config: Config,
    reporter: Reporter = SILENT,
    *,
    costs: CostSource | None = None,
    count: TokenCount | None = None,
    parallel: int | None = None,
    sharers: int = 1,
) -> Session:
    """Find the prepared model and make it ready to answer.

    `costs` replaces what would be probed on this machine, for experiments that must not depend on a clock. `count`
    counts the tokens of a known prompt: the context is then made for it, unless the settings give one. `parallel` is
    the number of answers in flight, each with sampling settings of its own; None is one at a time. `sharers` is the
    number of sessions that read this machine's disk, this one among them. Notes go to the reporter and into the
    session's description. Raises what `load` raises.
    """
    found = find_model(config)
    config = with_model_sampling(config, found.repository.sampling)
    reporter.progress("loading libraries")
    set_openmp_defaults()
    keep_compiled_loops()
    check_libraries_fit()
    from subspec_cli.session.build import build_session

    return build_session(
        config, found, reporter, costs=costs, count=count, parallel=parallel, sharers=sharers
    )


def _by_section(settings: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """Return settings under the sections that they belong to."""
    sections = {
        key: section
        for section in ("model", "memory", "draft", "sampling", "run")
        for setting in settings_of(SECTIONS[section]).values()
        for key in (setting.key, setting.alias)
        if key
    }
    flags: dict[str, dict[str, object]] = {section: {} for section in sections.values()}
    for name, value in settings.items():
        if name not in sections:
            raise UsageError(f"{name} is no setting of a session", f"settings: {' '.join(sections)}")
        flags[sections[name]][name] = value
    return flags
