"""`subspec plan`: memory and speed of a model on this machine before it is downloaded or prepared. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.config import Config
from subspec_cli.errors import ResourceError, UsageError
from subspec_cli.hub.model_outline import outline_model
from subspec_cli.planning.advice import Advice, advise
from subspec_cli.planning.assumed_costs import assumed_costs
from subspec_cli.planning.costs import MachineCosts
from subspec_cli.planning.device_profile import device_profile
from subspec_cli.planning.plan import OffloadPlan, PlanBounds, bounds_of, fastest_plan, make_plan
from subspec_cli.planning.request import (
    MemoryLimits,
    PlanRequest,
    automatic_budget,
    budget_bytes,
    plan_request,
    ram_bytes,
)
from subspec_cli.probe.kept_acceptance import acceptance_subject, kept_acceptance
from subspec_cli.probe.kept_costs import known_costs, probe_subject
from subspec_cli.probe.kept_rates import DOWNLOAD, kept_rate, preparing
from subspec_cli.reporter import Reporter
from subspec_cli.session.openmp import set_openmp_defaults
from subspec_cli.session.sampling_source import with_model_sampling
from subspec_cli.session.stream_forms import StreamForm, has_residuals, stream_forms
from subspec_cli.setting_rules import BIT_WIDTHS, DEFAULT_BITS
from subspec_cli.streaming.host_memory import gpu_memory, has_gpu, host_memory
from subspec_cli.streaming.process_limits import check_libraries_fit
from subspec_cli.substitutes.prepared_model import PreparedModel, find_prepared_sets
from subspec_cli.substitutes.prepared_names import full_name
from subspec_cli.substitutes.settings import SubstituteSettings, substitute_head_bytes, substitute_layer_bytes
from subspec_cli.units import gib_to_bytes


@dataclass(frozen=True, slots=True)
class BudgetRow:
    """One budget of a comparison."""

    budget_bytes: int
    plan: OffloadPlan | None
    """None if it is too small."""
    problem: str
    """Why, and what works instead."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is known of a model on a machine before it runs there."""

    model_id: str
    commit: str
    geometry: ModelGeometry
    end_ids: tuple[int, ...]
    """Tokens that end an answer."""
    device: str
    device_reason: str
    is_prepared: bool
    download_bytes: int
    """Bytes that `prepare` would still fetch."""
    download_bytes_per_s: float | None
    """Rate of the last download; None if none was measured."""
    prepare_s: float | None
    """Time that the preparation takes at the rate of the last one; None if none was measured, or if it is done."""
    substitute_disk_bytes: int
    received_bytes: int
    """Bytes that came over the network for this forecast."""
    plan: OffloadPlan | None
    """None if only budgets are compared."""
    best_plain: OffloadPlan | None
    """Plain decoding without the memory of substitutes."""
    bounds: PlanBounds | None
    advice: Advice | None
    """None if only budgets are compared."""
    compared: tuple[BudgetRow, ...]

    @property
    def download_s(self) -> float | None:
        """Time of the download at the rate of the last one; None if there is none, or none was measured."""
        rate = self.download_bytes_per_s
        return self.download_bytes / rate if self.download_bytes and rate else None


def forecast(
    model: str,
    config: Config,
    *,
    link_gb_per_s: float | None,
    compare_gib: Sequence[float],
    parallel: int | None = None,
    follow_links: bool = False,
    reporter: Reporter,
) -> Forecast:
    """Plan a model that need not be downloaded: its config and headers are enough.

    Without a budget, but with budgets to compare, only those are planned. Raises what `outline_model` and
    `make_plan` raise, and UsageError for a bad budget.
    """
    set_openmp_defaults()  # so that the costs of a run are found, which depend on its threads
    device, device_reason = _device(config.memory.device)
    model = _whole_name(model)
    outline = outline_model(model, config.model.revision, follow_links=follow_links, reporter=reporter)
    for note in outline.repository.notes:
        reporter.note(note)
    geometry = outline.repository.geometry
    config = with_model_sampling(config, outline.repository.sampling)
    prepared = _prepared(model, config, reporter)
    chosen = [item.manifest.settings for item in prepared] or [_settings(config)]
    compare_bytes = [gib_to_bytes(gib, "--compare") for gib in compare_gib]
    wants_one = config.memory.memory_gib is not None or not compare_bytes
    if wants_one and config.memory.memory_gib is None and device == "cpu":
        check_libraries_fit()  # a share of nothing would be called too small
    total, free = _device_memory(config, device) if wants_one else (None, None)
    budget = budget_bytes(config, device, total, free) if wants_one else compare_bytes[0]
    limits = MemoryLimits(
        device_profile(device).kind,
        budget,
        ram_bytes(config, None),
        automatic_budget(config, device, total, free),
    )

    def request_for(settings: SubstituteSettings, form: StreamForm | None = None) -> PlanRequest:
        planned = plan_request(
            config,
            form.geometry if form else geometry,
            settings,
            form.costs if form else costs_of(settings),
            limits=limits,
            tokenizer_bytes=outline.tokenizer_bytes,
        )
        subject = acceptance_subject(outline.model_id, outline.commit, settings, config.sampling)
        request = planned.for_parallel(parallel).after_runs(kept_acceptance(subject))
        return replace(request, streams_residuals=form is not None and form.residuals is not None)

    def costs_of(settings: SubstituteSettings, *, rebuilds: bool = False) -> MachineCosts:
        return _costs(geometry, settings, (device, outline.directory, rebuilds), link_gb_per_s)

    forms = [
        form
        for item in prepared
        for form in stream_forms(
            item,
            geometry,
            outline.repository.tensors,
            costs_of(item.manifest.settings, rebuilds=has_residuals(item, config)),
            config,
            reporter.note,
        )
    ]
    requests = [request_for(form.prepared.manifest.settings, form) for form in forms]
    requests = requests or [request_for(settings) for settings in chosen]
    number, plan = fastest_plan(requests) if wants_one else (0, None)
    request = requests[number]
    untried = () if config.model.bits else tuple(set(BIT_WIDTHS) - {item.bits for item in chosen})
    others = tuple(request_for(SubstituteSettings(bits, "minmax")) for bits in sorted(untried))
    return Forecast(
        model_id=outline.model_id,
        commit=outline.commit,
        geometry=geometry,
        end_ids=outline.repository.end_ids,
        device=device,
        device_reason=device_reason,
        is_prepared=bool(prepared),
        download_bytes=outline.missing_bytes,
        download_bytes_per_s=kept_rate(DOWNLOAD),
        prepare_s=None if prepared else _prepare_s(geometry, chosen[0]),
        substitute_disk_bytes=_disk_bytes(
            geometry, prepared, forms[number].prepared.manifest.settings if forms else chosen[number]
        ),
        received_bytes=outline.received_bytes,
        plan=plan,
        best_plain=None if plan is None else _best_plain(request, plan),
        bounds=bounds_of(request) if wants_one else None,
        advice=advise(request, plan, others if request.substitute_bytes else ()) if plan else None,
        compared=tuple(_row(requests, size) for size in compare_bytes),
    )


def _costs(
    geometry: ModelGeometry,
    settings: SubstituteSettings,
    machine: tuple[str, Path | None, bool],
    link_gb_per_s: float | None,
) -> MachineCosts:
    """Return the costs that a run has kept, unless a link rate is given; else assumed costs.

    `machine` is the device, the directory of the weights, and whether residuals are rebuilt.
    """
    device, directory, rebuilds = machine
    if directory is not None and link_gb_per_s is None:
        known = known_costs(probe_subject(geometry, settings, device, directory, rebuilds=rebuilds))
        if known is not None:
            return known
    return assumed_costs(geometry, device, link_gb_per_s, settings)


def _device(name: str) -> tuple[str, str]:
    """Return the device to plan for, and why. Asking torch, which knows for certain, would take seconds."""
    if name != "auto":
        return name, "as asked for"
    if has_gpu():
        return "cuda", "an NVIDIA driver is loaded"
    return "cpu", "no NVIDIA driver is loaded; --device cuda plans for a GPU"


def _device_memory(config: Config, device: str) -> tuple[int | None, int | None]:
    """Return total and free bytes of the device for an automatic budget; None where they are not known or needed.

    A budget that was given may be for another machine.
    """
    if config.memory.memory_gib is not None:
        return None, None
    if device == "cpu":
        return None, host_memory().free_bytes
    return gpu_memory() or (None, None)


def _whole_name(model: str) -> str:
    """Return the id that a prepared model's last name means; any other name as it is."""
    try:
        return full_name(model)
    except ResourceError:  # `_prepared` says that the place of prepared models cannot be read
        return model


def _prepared(model: str, config: Config, reporter: Reporter) -> tuple[PreparedModel, ...]:
    """Return the sets of substitutes that are there; no set is no error, and neither is no place for sets."""
    try:
        return find_prepared_sets(model, config.model.bits)
    except ResourceError as error:
        reporter.note(f"{error}, so nothing counts as prepared; {error.hint}")
        return ()
    except UsageError:
        return ()


def _settings(config: Config) -> SubstituteSettings:
    bits = config.model.bits or config.substitute.bits or DEFAULT_BITS
    return SubstituteSettings(bits, config.substitute.optimizer)


def _disk_bytes(
    geometry: ModelGeometry, prepared: Sequence[PreparedModel], settings: SubstituteSettings
) -> int:
    """Return the bytes of the substitutes' files: their present size, or an estimate."""
    for item in prepared:
        if item.manifest.settings == settings:
            return sum(file.size_bytes for file in item.manifest.files)
    return sum(substitute_layer_bytes(geometry, settings)) + substitute_head_bytes(geometry)


def _prepare_s(geometry: ModelGeometry, settings: SubstituteSettings) -> float | None:
    rate = kept_rate(preparing(settings.optimizer))
    return None if rate is None else (geometry.matrix_bytes + geometry.table_bytes) / rate


def _best_plain(request: PlanRequest, plan: OffloadPlan) -> OffloadPlan | None:
    """Return plain decoding's own best plan in the same context; None if even that does not fit."""
    try:
        return make_plan(replace(request, substitute_bytes=None, context=plan.context))
    except ResourceError:
        return None


def _row(requests: Sequence[PlanRequest], size_bytes: int) -> BudgetRow:
    try:
        plan = fastest_plan([replace(request, budget_bytes=size_bytes) for request in requests])[1]
    except ResourceError as error:
        return BudgetRow(size_bytes, None, error.hint)
    return BudgetRow(size_bytes, plan, "")
