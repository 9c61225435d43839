"""An opening: the device, the model, its plan and the plan's costs, decided before anything large is allocated."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from subspec_cli.checkpoint.dtypes import torch_dtype
from subspec_cli.checkpoint.source_directory import tokenizer_bytes_in
from subspec_cli.config import Config
from subspec_cli.errors import UnsupportedModelError
from subspec_cli.planning.costs import PlanCosts
from subspec_cli.planning.device_profile import device_profile
from subspec_cli.planning.plan import OffloadPlan, fastest_plan
from subspec_cli.planning.request import (
    MemoryLimits,
    WantedTokens,
    automatic_budget,
    budget_bytes,
    plan_request,
    ram_bytes,
)
from subspec_cli.reporter import Reporter
from subspec_cli.session.found_model import FoundModel
from subspec_cli.session.learning import learned_acceptance
from subspec_cli.session.machine_costs import CostSource
from subspec_cli.session.stream_forms import stream_forms
from subspec_cli.streaming.host_memory import host_memory
from subspec_cli.streaming.memory_meter import allocator_share, available_bytes, total_bytes
from subspec_cli.substitutes.residual_set import ResidualSet


@dataclass(frozen=True, slots=True)
class Opening:
    """Everything that loading needs to know."""

    found: FoundModel
    plan: OffloadPlan
    costs: PlanCosts
    """Costs of the plan's passes and draft steps: the shapes of draft trees depend on them and on tokens alone."""
    device: torch.device
    reporter: Reporter
    residuals: ResidualSet | None = None
    """Residuals that are streamed in place of the target's layers, if the plan says so."""

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights, the activations and the KV cache."""
        return torch_dtype(self.found.geometry.dtype)


def plan_opening(
    config: Config,
    found: FoundModel,
    device: torch.device,
    costs: CostSource,
    *,
    wanted: WantedTokens | None,
    parallel: int | None,
    reporter: Reporter,
) -> Opening:
    """Take the fastest plan over all sets of substitutes of the model, for the tokens that are wanted if known.

    Raises what `fastest_plan` raises, and ResourceError for a budget that the device does not have.
    """
    sets = (found.prepared, *found.others)
    host_bytes = available_bytes(torch.device("cpu")) if device.type == "cuda" else None
    total, free = total_bytes(device), available_bytes(device)
    owner = host_memory().owner if device.type == "cpu" else "this GPU has"
    limits = MemoryLimits(
        device_profile(device.type).kind,
        budget_bytes(config, device.type, total, free, owner),
        ram_bytes(config, host_bytes),
        automatic_budget(config, device.type, total, free),
    )
    machines = [costs(found.geometry, prepared.manifest.settings) for prepared in sets]
    forms = [
        form
        for prepared, machine in zip(sets, machines, strict=True)
        for form in stream_forms(
            prepared, found.geometry, found.checkpoint.tensors, machine, config, reporter.note
        )
    ]
    requests = [
        replace(
            plan_request(
                config,
                form.geometry,
                form.prepared.manifest.settings,
                form.costs,
                limits=limits,
                tokenizer_bytes=tokenizer_bytes_in(found.checkpoint.directory),
                wanted=wanted,
            )
            .for_parallel(parallel)
            .after_runs(learned_acceptance(form.prepared.manifest, config.sampling)),
            streams_residuals=form.residuals is not None,
        )
        for form in forms
    ]
    number, plan = fastest_plan(requests)
    chosen = forms[number]
    return Opening(
        replace(found, prepared=chosen.prepared),
        plan,
        plan.costs(chosen.costs, chosen.geometry),
        device,
        reporter,
        chosen.residuals if plan.streamed else None,
    )


def open_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` takes a GPU if there is one.

    Raises UnsupportedModelError if `cuda` is asked for and cannot be used.
    """
    has_gpu = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if has_gpu else "cpu"
    if name == "cuda":
        if not has_gpu:
            raise UnsupportedModelError(
                "no CUDA device can be used here", "--device cpu runs from disk and RAM"
            )
        _fix_cuda_arithmetic()
    return torch.device(name)


def cap_allocator(budget_bytes: int, device: torch.device) -> None:
    """Let PyTorch refuse to take more of a GPU than the budget; on the CPU the plan alone keeps it."""
    if device.type == "cuda":
        share = allocator_share(budget_bytes, device_profile(device.type).context_bytes, total_bytes(device))
        torch.cuda.set_per_process_memory_fraction(share, device)


def _fix_cuda_arithmetic() -> None:
    """Switch off, for the whole process, the shortcuts that make a row's bits depend on the chosen kernel."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
