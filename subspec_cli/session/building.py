"""From a checked model to a ready session: plan first, allocate second, check rows third."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import torch

from subspec_cli.config import Config
from subspec_cli.decoding.certify import Certificate, certify
from subspec_cli.decoding.drafter import Drafter, RootOnly, TreeGrower
from subspec_cli.decoding.engine import PREFILL_CHUNK, Engine
from subspec_cli.decoding.schedule import Schedule, TreeLimits
from subspec_cli.errors import ResourceError, UnsupportedModelError
from subspec_cli.modeling.families import ModelTokenizer, end_token_ids, load_config
from subspec_cli.modeling.layers import RowRules
from subspec_cli.placement.geometry import ModelGeometry, substitute_layer_bytes
from subspec_cli.placement.memory import (
    CUDA_CONTEXT_BYTES,
    MemoryMeter,
    allocator_share,
    available_bytes,
    return_freed_memory_at_once,
    total_bytes,
)
from subspec_cli.placement.plan import OffloadPlan, PlanRequest, make_plan
from subspec_cli.session.loading import LoadedModel, Loader
from subspec_cli.session.session import Session, SessionDescription, SessionParts
from subspec_cli.session.shortage import shortage_told
from subspec_cli.session.source import ModelSource
from subspec_cli.store.checkpoint import check_unchanged
from subspec_cli.units import format_bytes, gib_to_bytes
from subspec_cli.versions import library_versions

DEFAULT_DEPTH: Final = 32
DEFAULT_WIDTH: Final = 3
_TREE_NODES: Final = 64
_DEFAULT_SHARE: Final = 0.75
"""Share of the available memory taken when the user names no budget."""


def build_session(config: Config, source: ModelSource, progress: Callable[[str], None]) -> Session:
    """Plan, load, check rows. Nothing large is allocated before the plan holds."""
    device = _device(config.memory.device)
    plan = _plan(config, source, device)
    return_freed_memory_at_once()
    # Everything is imported by now: what memory grows from here on is the model's.
    meter = MemoryMeter(device)
    cap_allocator(plan.budget_bytes, device)
    with shortage_told("loading the model", budget_bytes=plan.budget_bytes, meter=meter):
        return _load(config, source, plan, device, meter, progress)


def cap_allocator(budget_bytes: int, device: torch.device) -> None:
    """Let PyTorch refuse to take more of a card than the budget; on the CPU the plan alone keeps it."""
    if device.type == "cuda":
        share = allocator_share(budget_bytes, CUDA_CONTEXT_BYTES, total_bytes(device))
        torch.cuda.set_per_process_memory_fraction(share, device)


def _load(
    config: Config,
    source: ModelSource,
    plan: OffloadPlan,
    device: torch.device,
    meter: MemoryMeter,
    progress: Callable[[str], None],
) -> Session:
    progress("loading the tokenizer")
    tokenizer = ModelTokenizer(source.checkpoint.directory, source.geometry.vocab)
    model_config = load_config(source.checkpoint.directory)
    speculate = bool(plan.streamed) and not config.draft.no_speculation
    loaded = Loader(
        source.prepared,
        source.checkpoint,
        source.geometry,
        plan,
        model_config,
        device,
        _tree_nodes(config),
        progress,
    ).load(with_draft=speculate)
    try:
        # What was read so far came from the files that were opened, or nothing is answered.
        check_unchanged(source.checkpoint)
        progress("checking that rows keep their bits")
        certificate = _certify(loaded, source.geometry, config, device)
        eos_ids = end_token_ids(source.checkpoint.directory, model_config, tokenizer)
        parts = _parts(config, loaded, certificate.rules, tokenizer, eos_ids, meter, device)
    except BaseException:
        loaded.close()
        raise
    return Session(parts, _describe(config, source, plan, certificate, parts, loaded, device))


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


def _plan(config: Config, source: ModelSource, device: torch.device) -> OffloadPlan:
    geometry, settings = source.geometry, source.prepared.manifest.settings
    directory = source.checkpoint.directory
    tokenizer_bytes = sum(path.stat().st_size for path in directory.glob("tokenizer*") if path.is_file())
    substitutes = (substitute_layer_bytes(geometry, settings),) * geometry.layers
    return make_plan(
        PlanRequest(
            geometry=geometry,
            budget_bytes=_budget(config, device),
            device=device.type,
            substitute_bytes=None if config.draft.no_speculation else substitutes,
            tokenizer_bytes=tokenizer_bytes,
            context=config.memory.context,
            resident_layers=config.memory.resident_layers,
            tree_nodes=_tree_nodes(config),
            prefill_rows=PREFILL_CHUNK,
            model_context=geometry.max_positions,
        )
    )


def _budget(config: Config, device: torch.device) -> int:
    if config.memory.vram_gb is None:
        return int(available_bytes(device) * _DEFAULT_SHARE)
    option = "--memory-gb" if device.type == "cpu" else "--vram-gb"
    budget = gib_to_bytes(config.memory.vram_gb, option)
    most = total_bytes(device)
    if budget > most:
        raise ResourceError(
            f"a budget of {format_bytes(budget)} is more than this machine has: {format_bytes(most)}",
            f"{option} {most * 3 // 4 / (1 << 30):.1f} leaves a quarter to others",
        )
    return budget


def _tree_nodes(config: Config) -> int:
    """Most nodes of a tree; a fixed shape may need more than the usual bound."""
    depth, width = config.draft.depth or 0, config.draft.width or 1
    return max(_TREE_NODES, depth * width + 1)


def _certify(
    loaded: LoadedModel, geometry: ModelGeometry, config: Config, device: torch.device
) -> Certificate:
    return certify(
        loaded.target,
        loaded.head,
        loaded.source,
        geometry,
        most_nodes=_tree_nodes(config),
        prefill_rows=PREFILL_CHUNK,
        dtype=loaded.dtype,
        device=device,
    )


def _parts(
    config: Config,
    loaded: LoadedModel,
    rules: RowRules,
    tokenizer: ModelTokenizer,
    eos_ids: frozenset[int],
    meter: MemoryMeter,
    device: torch.device,
) -> SessionParts:
    limits = TreeLimits(
        depth=config.draft.depth or DEFAULT_DEPTH,
        width=config.draft.width or DEFAULT_WIDTH,
        nodes=_tree_nodes(config),
    )
    schedule = Schedule(limits=limits, fixed_depth=config.draft.depth is not None)
    target = loaded.target(rules)

    def engine(grower: TreeGrower, own: Schedule) -> Engine:
        return Engine(target, loaded.kv, grower, own, counters=loaded.counters, device=device)

    plain = engine(RootOnly(), Schedule(limits=limits, fixed_depth=False))
    speculative = plain
    if loaded.draft is not None:
        drafter = Drafter(
            loaded.draft,
            loaded.kv,
            schedule,
            eos_ids=eos_ids,
            device=device,
            fixed_width=config.draft.width is not None,
        )
        speculative = engine(drafter, schedule)
    seed = secrets.randbits(63) if config.sampling.seed is None else config.sampling.seed
    sampling = replace(config.sampling, seed=seed)
    return SessionParts(
        tokenizer,
        eos_ids,
        loaded.kv,
        speculative,
        plain,
        sampling,
        meter,
        loaded.counters,
        loaded.close,
        loaded.check_source,
    )


def _describe(
    config: Config,
    source: ModelSource,
    plan: OffloadPlan,
    certificate: Certificate,
    parts: SessionParts,
    loaded: LoadedModel,
    device: torch.device,
) -> SessionDescription:
    assert parts.sampling.seed is not None
    return SessionDescription(
        model_id=source.prepared.manifest.model_id,
        revision=source.prepared.manifest.commit,
        device=device.type,
        dtype=source.geometry.dtype.lower(),
        exactness=certificate.exactness,
        exactness_reason=certificate.reason,
        speculation=loaded.draft is not None,
        fits=plan.fits,
        seed=parts.sampling.seed,
        fresh_seed=config.sampling.seed is None,
        threads=certificate.threads,
        context_tokens=plan.context,
        budget_bytes=plan.budget_bytes,
        plan=plan,
        versions=library_versions(),
        has_chat_template=parts.tokenizer.has_chat_template,
        direct_io=loaded.reads_directly(),
    )
