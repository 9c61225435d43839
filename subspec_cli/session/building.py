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
from subspec_cli.errors import UnsupportedModelError
from subspec_cli.modeling.families import ModelTokenizer, end_token_ids, load_config
from subspec_cli.modeling.layers import RowRules
from subspec_cli.placement.assumed import assumed_costs
from subspec_cli.placement.geometry import ModelGeometry
from subspec_cli.placement.memory import (
    MemoryMeter,
    available_bytes,
    return_freed_memory_at_once,
    total_bytes,
)
from subspec_cli.placement.plan import OffloadPlan, fastest_plan
from subspec_cli.session.loading import LoadedModel, Loader
from subspec_cli.session.planning import (
    budget_bytes,
    most_tree_nodes,
    plan_request,
    ram_bytes,
    tokenizer_bytes_in,
)
from subspec_cli.session.session import Session, SessionDescription, SessionParts
from subspec_cli.session.source import ModelSource
from subspec_cli.store.checkpoint import check_unchanged
from subspec_cli.store.usage import mark_used
from subspec_cli.versions import library_versions

DEFAULT_DEPTH: Final = 32
DEFAULT_WIDTH: Final = 3


def build_session(config: Config, source: ModelSource, progress: Callable[[str], None]) -> Session:
    """Plan, load, check rows. Nothing large is allocated before the plan holds."""
    device = _device(config.memory.device)
    source, plan = _plan(config, source, device)
    return_freed_memory_at_once()
    # Everything is imported by now: what memory grows from here on is the model's.
    meter = MemoryMeter(device)
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(plan.budget_bytes / total_bytes(device), device)
    progress("loading the tokenizer")
    tokenizer = ModelTokenizer(source.checkpoint.directory, source.geometry.vocab)
    model_config = load_config(source.checkpoint.directory)
    speculate = plan.drafts
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
    mark_used(source.prepared.directory)
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


def _plan(config: Config, source: ModelSource, device: torch.device) -> tuple[ModelSource, OffloadPlan]:
    """The fastest plan over the sets of substitutes that are there, and the source with the set it takes."""
    geometry = source.geometry
    sets = (source.prepared, *source.others)
    on_card = device.type == "cuda"
    host = torch.device("cpu")
    requests = [
        plan_request(
            config,
            geometry,
            prepared.manifest.settings,
            assumed_costs(geometry, device.type, settings=prepared.manifest.settings),
            device=device.type,
            budget_bytes=budget_bytes(config, device.type, total_bytes(device), available_bytes(device)),
            ram_bytes=ram_bytes(config, available_bytes(host) if on_card else None),
            tokenizer_bytes=tokenizer_bytes_in(source.checkpoint.directory),
        )
        for prepared in sets
    ]
    number, plan = fastest_plan(requests)
    return replace(source, prepared=sets[number]), plan


def _tree_nodes(config: Config) -> int:
    return most_tree_nodes(config)


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
