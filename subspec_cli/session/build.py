"""From a checked model to a ready session: plan first, allocate second, check rows third."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from dataclasses import replace

import torch

from subspec_cli.checkpoint.checkpoint import check_unchanged
from subspec_cli.checkpoint.source_directory import tokenizer_bytes_in
from subspec_cli.config import Config
from subspec_cli.decoding.drafter import Drafter as DrafterProtocol
from subspec_cli.decoding.drafter import PlainDrafter
from subspec_cli.decoding.engine import Engine
from subspec_cli.drafting.drafter import Drafter
from subspec_cli.drafting.policy import DraftPolicy, FixedShape, TreeLimits
from subspec_cli.errors import UnsupportedModelError
from subspec_cli.limits import MOST_DEPTH, MOST_ROWS, PREFILL_CHUNK
from subspec_cli.modeling.layers import RowRules
from subspec_cli.modeling.pretrained import ModelTokenizer, end_token_ids, load_config
from subspec_cli.modeling.self_check import SelfCheck, check_batch_invariance
from subspec_cli.planning.assumed_costs import assumed_costs
from subspec_cli.planning.costs import MachineCosts, PlanCosts
from subspec_cli.planning.device_profile import device_profile
from subspec_cli.planning.plan import OffloadPlan, fastest_plan
from subspec_cli.planning.request import MemoryLimits, budget_bytes, plan_request, ram_bytes
from subspec_cli.probe.child_process import ProbeFailedError, probe_apart
from subspec_cli.probe.kept_costs import keep_costs, known_costs, probe_subject
from subspec_cli.reporter import Reporter
from subspec_cli.session.found_model import FoundModel
from subspec_cli.session.load import LoadedModel, Loader
from subspec_cli.session.oom import oom_as_error
from subspec_cli.session.session import Session, SessionDescription, SessionParts
from subspec_cli.streaming.memory_meter import (
    MemoryMeter,
    allocator_share,
    available_bytes,
    return_freed_memory_at_once,
    total_bytes,
)
from subspec_cli.substitutes.last_use import mark_used
from subspec_cli.substitutes.prepared_model import PreparedModel
from subspec_cli.units import printable
from subspec_cli.versions import library_versions


def build_session(config: Config, found: FoundModel, reporter: Reporter) -> Session:
    """Plan, load, check rows. Nothing large is allocated before the plan holds."""
    device = _device(config.memory.device)
    return_freed_memory_at_once()
    notes: list[str] = []
    reporter = Reporter(reporter.progress, notes.append)
    found, plan, machine = _plan(config, found, device, reporter)
    # Everything is imported by now: what memory grows from here on is the model's.
    meter = MemoryMeter(device)
    cap_allocator(plan.budget_bytes, device)
    with oom_as_error("loading the model", budget_bytes=plan.budget_bytes, meter=meter):
        costs = plan.costs(machine, found.geometry)
        return _load(config, found, plan, costs, device, meter, reporter, notes)


def cap_allocator(budget_bytes: int, device: torch.device) -> None:
    """Let PyTorch refuse to take more of a GPU than the budget; on the CPU the plan alone keeps it."""
    if device.type == "cuda":
        share = allocator_share(budget_bytes, device_profile(device.type).context_bytes, total_bytes(device))
        torch.cuda.set_per_process_memory_fraction(share, device)


def _load(
    config: Config,
    found: FoundModel,
    plan: OffloadPlan,
    costs: PlanCosts,
    device: torch.device,
    meter: MemoryMeter,
    reporter: Reporter,
    notes: list[str],
) -> Session:
    reporter.progress("loading the tokenizer")
    tokenizer = ModelTokenizer(found.checkpoint.directory, found.geometry.vocab)
    model_config = load_config(found.checkpoint.directory)
    loaded = Loader(
        found.prepared,
        found.checkpoint,
        found.geometry,
        plan,
        model_config,
        device,
        plan.scratch_rows,
        plan.draft_rows,
        reporter,
    ).load(with_draft=plan.drafts)
    try:
        # What was read so far came from the files that were opened, or nothing is answered.
        check_unchanged(found.checkpoint)
        reporter.progress("checking that rows keep their bits")
        self_check = _check_batch_invariance(loaded, plan.tree_nodes)
        eos_ids = end_token_ids(found.checkpoint.directory, model_config, tokenizer)
        engines = _engines(config, plan, costs, loaded, self_check.rules, eos_ids)
        parts = _parts(config, loaded, engines, tokenizer, eos_ids, meter)
    except BaseException:
        loaded.close()
        raise
    mark_used(found.prepared.directory)
    return Session(parts, _describe(config, found, plan, costs, self_check, parts, loaded, device, notes))


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UnsupportedModelError("no CUDA device can be used here", "--device cpu runs from disk and RAM")
    if name == "cuda":
        _fix_cuda_arithmetic()
    return torch.device(name)


def _fix_cuda_arithmetic() -> None:
    """Shortcuts that make a row's bits depend on the kernel of the day are switched off, for the process."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def _plan(
    config: Config,
    found: FoundModel,
    device: torch.device,
    reporter: Reporter,
) -> tuple[FoundModel, OffloadPlan, MachineCosts]:
    """The fastest plan over the sets of substitutes that are there, the found with its set, and the costs."""
    geometry = found.geometry
    sets = (found.prepared, *found.others)
    on_gpu = device.type == "cuda"
    host = torch.device("cpu")
    limits = MemoryLimits(
        device_profile(device.type).kind,
        budget_bytes(config, device.type, total_bytes(device), available_bytes(device)),
        ram_bytes(config, available_bytes(host) if on_gpu else None),
    )
    costs = [_costs(config, found, prepared, device, reporter) for prepared in sets]
    requests = [
        plan_request(
            config,
            geometry,
            prepared.manifest.settings,
            known,
            limits=limits,
            tokenizer_bytes=tokenizer_bytes_in(found.checkpoint.directory),
        )
        for prepared, known in zip(sets, costs, strict=True)
    ]
    number, plan = fastest_plan(requests)
    return replace(found, prepared=sets[number]), plan, costs[number]


def _costs(
    config: Config,
    found: FoundModel,
    prepared: PreparedModel,
    device: torch.device,
    reporter: Reporter,
) -> MachineCosts:
    """What was probed before on this machine, else probed now and kept; assumed where that fails."""
    settings = prepared.manifest.settings
    subject = probe_subject(found.geometry, settings, device.type, found.checkpoint.directory)
    known = None if config.memory.reprobe else known_costs(subject)
    if known is not None:
        return known
    try:
        probed = probe_apart(found.checkpoint.directory, settings, device, reporter)
    except ProbeFailedError as error:
        reporter.note(
            f"this machine could not be timed, so the plan assumes what it can do: {printable(str(error))}"
        )
        return assumed_costs(found.geometry, device.type, settings=settings)
    keep_costs(subject, probed)
    return probed


def _check_batch_invariance(loaded: LoadedModel, most_nodes: int) -> SelfCheck:
    return check_batch_invariance(
        loaded.target,
        loaded.head,
        loaded.blocks,
        most_nodes=most_nodes,
        prefill_rows=PREFILL_CHUNK,
    )


def _engines(
    config: Config,
    plan: OffloadPlan,
    costs: PlanCosts,
    loaded: LoadedModel,
    rules: RowRules,
    eos_ids: frozenset[int],
) -> tuple[Engine, Engine]:
    """The speculative engine and the plain one; the same one twice if there is nothing to draft with."""
    fixed = FixedShape(config.draft.depth, config.draft.width)
    limits = TreeLimits(fixed.depth or MOST_DEPTH, fixed.width or MOST_ROWS, plan.tree_nodes)
    layers = len(plan.resident) + len(plan.streamed)
    target = loaded.target(rules)

    def engine(drafter: DrafterProtocol) -> Engine:
        return Engine(target, loaded.kv, drafter, counters=loaded.counters)

    plain = engine(PlainDrafter())
    if loaded.draft is None:
        return plain, plain
    policy = DraftPolicy(limits, costs, layers, fixed, plan.shadow_rows)
    return engine(Drafter(loaded.draft, loaded.kv, policy, eos_ids=eos_ids)), plain


def _parts(
    config: Config,
    loaded: LoadedModel,
    engines: tuple[Engine, Engine],
    tokenizer: ModelTokenizer,
    eos_ids: frozenset[int],
    meter: MemoryMeter,
) -> SessionParts:
    seed = secrets.randbits(63) if config.sampling.seed is None else config.sampling.seed
    return SessionParts(
        tokenizer,
        eos_ids,
        loaded.kv,
        *engines,
        replace(config.sampling, seed=seed),
        meter,
        loaded.counters,
        loaded.close,
        loaded.check_source,
    )


def _describe(
    config: Config,
    found: FoundModel,
    plan: OffloadPlan,
    costs: PlanCosts,
    self_check: SelfCheck,
    parts: SessionParts,
    loaded: LoadedModel,
    device: torch.device,
    notes: Sequence[str],
) -> SessionDescription:
    assert parts.sampling.seed is not None
    return SessionDescription(
        model_id=found.prepared.manifest.model_id,
        revision=found.prepared.manifest.commit,
        device=device.type,
        dtype=found.geometry.dtype.lower(),
        exactness=self_check.exactness,
        exactness_reason=self_check.reason,
        speculation=loaded.draft is not None,
        fits=plan.fits,
        seed=parts.sampling.seed,
        fresh_seed=config.sampling.seed is None,
        threads=self_check.threads,
        context_tokens=plan.context,
        budget_bytes=plan.budget_bytes,
        plan=plan,
        costs=costs,
        versions=library_versions(),
        has_chat_template=parts.tokenizer.has_chat_template,
        direct_io=loaded.reads_directly(),
        notes=tuple(notes),
    )
