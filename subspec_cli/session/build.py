"""From a found model to a ready session: count the prompt, plan, allocate, check rows, in this order."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from subspec_cli.config import Config, DraftConfig
from subspec_cli.decoding.drafter import PlainDrafter
from subspec_cli.drafting.policy import DraftPolicy, FixedShape, TreeLimits
from subspec_cli.drafting.tree_drafter import TreeDrafter
from subspec_cli.limits import MOST_DEPTH, MOST_ROWS, SEED_BITS
from subspec_cli.modeling.pretrained import ModelTokenizer, import_libraries
from subspec_cli.planning.request import WantedTokens, check_prompt_fits
from subspec_cli.reporter import Reporter
from subspec_cli.session.description import SessionDescription
from subspec_cli.session.found_model import FoundModel
from subspec_cli.session.learning import Learning
from subspec_cli.session.load import LoadedModel, Loader
from subspec_cli.session.machine_costs import CostSource, ProbedCosts, SharedCosts
from subspec_cli.session.opening import Opening, open_device, plan_opening
from subspec_cli.session.sampling_source import own_sampling, sampling_notes
from subspec_cli.session.session import Engines, Session
from subspec_cli.session.stream_forms import has_residuals
from subspec_cli.session.token_biases import token_biases
from subspec_cli.streaming.memory_meter import MemoryMeter, return_freed_memory_at_once
from subspec_cli.units import counted
from subspec_cli.versions import library_versions

TokenCount = Callable[[ModelTokenizer], WantedTokens | None]
"""Counts the tokens of a prompt that is known before the plan is made.

None if there is no prompt yet; a prompt that the model's chat template refuses is refused here.
"""


def build_session(
    config: Config,
    found: FoundModel,
    reporter: Reporter,
    *,
    costs: CostSource | None = None,
    count: TokenCount | None = None,
    parallel: int | None = None,
    sharers: int = 1,
) -> Session:
    """Read the tokenizer, plan, load, check rows. Nothing large is allocated before the plan fits the budget.

    `parallel` is the number of answers in flight, each with sampling settings of its own; `sharers` that of the
    sessions that read this machine's disk.
    """
    notes: list[str] = []
    reporter = _recording(reporter, notes)
    device = open_device(config.memory.device)
    return_freed_memory_at_once()
    directory, geometry = found.checkpoint.directory, found.geometry
    import_libraries(
        found.repository.tokenizer.model_type,
        has_recurrent_layers=bool(geometry.delta),
        drafts_on_cpu=device.type == "cpu",
    )
    for note in (*found.repository.notes, *sampling_notes(config.sampling, found.repository.sampling)):
        reporter.note(note)
    # Every library is imported now: what memory grows by from here on is the run's.
    meter = MemoryMeter(device)
    reporter.progress("loading the tokenizer")
    tokenizer = ModelTokenizer(directory, found.repository.tokenizer)
    token_biases(
        config.sampling.logit_bias, tokenizer, geometry.vocab
    )  # one that names no token is refused now
    wanted = None if count is None else count(tokenizer)
    if wanted is not None:
        check_prompt_fits(wanted, config.memory.context, geometry.max_positions)
    is_alone = costs is None and sharers == 1
    costs = costs or ProbedCosts(
        directory,
        device.type,
        config.memory.reprobe,
        reporter,
        rebuilds=any(has_residuals(each, config) for each in (found.prepared, *found.others)),
    )
    if sharers > 1:
        costs = SharedCosts(costs, sharers, device.type)
        reporter.note(
            f"{sharers} replicas are on this machine: each is planned with 1/{sharers} of the disk's rate"
        )
    opening = plan_opening(config, found, device, costs, wanted=wanted, parallel=parallel, reporter=reporter)
    if wanted is not None and wanted.total > opening.plan.context:
        reporter.note(_bounded_answer(config, opening, wanted))
    loaded = Loader(opening, tokenizer, meter).load()
    try:
        description = _describe(config, opening, loaded, notes)
        learning = Learning(opening.found.prepared.manifest, _own_disk(opening, loaded) if is_alone else None)
        return Session(loaded, _engines(config.draft, opening, loaded), description, learning)
    except BaseException:
        loaded.close()
        raise


def _own_disk(opening: Opening, loaded: LoadedModel) -> int | None:
    """Return the device number of the disk whose rate was probed, if passes read it past the page cache."""
    found, streamer = opening.found, loaded.blocks.streamer
    if opening.device.type != "cpu" or streamer is None or not streamer.is_direct:
        return None
    disk = found.checkpoint.directory.stat().st_dev
    if opening.residuals is not None and found.prepared.directory.stat().st_dev != disk:
        return None
    return disk


def _recording(reporter: Reporter, notes: list[str]) -> Reporter:
    def note(text: str) -> None:
        notes.append(text)
        reporter.note(text)

    return Reporter(reporter.progress, note)


def _bounded_answer(config: Config, opening: Opening, wanted: WantedTokens) -> str:
    context, positions = opening.plan.context, opening.found.geometry.max_positions
    limit = f"the budget, which holds {context} tokens,"
    if config.memory.context is not None:
        limit = f"--context {context}"
    elif context == positions:
        limit = f"the model, made for {positions} positions,"
    left = context - wanted.prompt
    prompt = counted(wanted.prompt, "token")
    return f"the prompt has {prompt}, so {limit} leaves {left} for the answer, not {wanted.answer}"


def _engines(draft: DraftConfig, opening: Opening, loaded: LoadedModel) -> Engines:
    """Return the speculative engine and the plain one; the plain one twice if there is nothing to draft with."""
    plan = opening.plan
    plain = loaded.engine(PlainDrafter())
    if loaded.draft is None:
        return Engines(plain, plain)
    policy = DraftPolicy(
        max_tree=TreeLimits(draft.depth or MOST_DEPTH, draft.width or MOST_ROWS, plan.tree_nodes),
        costs=opening.costs,
        layers=opening.found.geometry.layers,
        fixed=FixedShape(draft.depth, draft.width),
        shadow_rows=plan.shadow_rows,
        together_nodes=plan.pass_nodes,
    )
    drafter = TreeDrafter(loaded.draft, policy, eos_ids=loaded.eos_ids)
    return Engines(loaded.engine(drafter), plain)


def _describe(config: Config, opening: Opening, loaded: LoadedModel, notes: list[str]) -> SessionDescription:
    found, streamer, seed = opening.found, loaded.blocks.streamer, config.sampling.seed
    return SessionDescription(
        model_id=found.prepared.manifest.model_id,
        revision=found.prepared.manifest.commit,
        dtype=found.geometry.dtype.lower(),
        config=config,
        plan=opening.plan,
        costs=opening.costs,
        self_check=loaded.self_check,
        seed=secrets.randbits(SEED_BITS) if seed is None else seed,
        end_ids=found.repository.end_ids,
        model_sampling=own_sampling(found.repository.sampling),
        has_chat_template=loaded.tokenizer.has_chat_template,
        direct_io=streamer is None or streamer.is_direct,
        versions=library_versions(),
        notes=tuple(notes),
    )
