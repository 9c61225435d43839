"""The plan: pure arithmetic, so held by properties over random models and budgets."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.checkpoint.layer_description import Arithmetic, AttentionShape
from subspec_cli.checkpoint.layer_tensors import spread
from subspec_cli.errors import ResourceError, UsageError
from subspec_cli.limits import MOST_ROWS, NOISE_ROWS, SMALL_BLOCK
from subspec_cli.planning.assumed_costs import assumed_costs
from subspec_cli.planning.costs import MachineCosts, RowTimes
from subspec_cli.planning.device_profile import device_profile
from subspec_cli.planning.layer_sizes import LayerSizes
from subspec_cli.planning.library_memory import bare_process_bytes
from subspec_cli.planning.memory import MemoryModel
from subspec_cli.planning.plan import OffloadPlan, fastest_plan, make_plan
from subspec_cli.planning.prediction import predict_at
from subspec_cli.planning.reason import FasterBits, GivenLayers, LayersThatPay, ShorterContext, WholeModel
from subspec_cli.planning.request import DEFAULT_CONTEXT, PlanRequest
from subspec_cli.planning.search import LayoutSearch, layouts, timed_layouts
from subspec_cli.substitutes.settings import (
    SubstituteSettings,
    substitute_head_bytes,
    substitute_layer_bytes,
)
from subspec_cli.units import GIB, MIB, parse_size_gib

FAST = settings(max_examples=60, deadline=None)
FEW = settings(max_examples=20, deadline=None)


def make_geometry(
    *,
    layers: int = 28,
    hidden: int = 1536,
    feed_forward: int = 8960,
    heads: int = 12,
    kv_heads: int = 2,
    vocab: int = 151_936,
    tied: bool = True,
    dtype: str = "BF16",
) -> ModelGeometry:
    """Qwen2.5-1.5B unless told otherwise."""
    return ModelGeometry(
        architecture="Qwen2ForCausalLM",
        dtype=dtype,
        hidden=hidden,
        feed_forward=feed_forward,
        vocab=vocab,
        max_positions=32_768,
        tied_head=tied,
        mixers=(AttentionShape(heads, kv_heads, 128),) * layers,
        arithmetic=Arithmetic(attention_scale=128**-0.5, eps=1e-6, qkv_bias=True),
    )


def make_request(geometry: ModelGeometry | None = None, **changes: Any) -> PlanRequest:
    geometry = geometry or make_geometry()
    device = changes.get("device", "cpu")
    request = PlanRequest(
        geometry=geometry,
        budget_bytes=2 * GIB,
        device=device,
        substitute_bytes=LayerSizes(substitute_layer_bytes(geometry, SubstituteSettings(4, "minmax"))),
        tokenizer_bytes=7 * MIB,
        context=None,
        resident_layers=None,
        tree_nodes=64,
        prefill_rows=256,
        model_context=geometry.max_positions,
        costs=assumed_costs(geometry, device),
    )
    return replace(request, **changes)


GEOMETRIES = st.builds(
    make_geometry,
    layers=st.integers(1, 80),
    hidden=st.integers(1, 64).map(lambda n: 128 * n),
    feed_forward=st.integers(1, 200).map(lambda n: 128 * n),
    heads=st.just(8),
    kv_heads=st.sampled_from([1, 2, 8]),
    vocab=st.integers(256, 200_000),
    tied=st.booleans(),
    dtype=st.sampled_from(["BF16", "F32"]),
)
CONTEXTS = st.none() | st.integers(1, 32_768)
SECONDS = st.floats(1e-6, 1.0)
TIMES = st.builds(
    lambda first, more: RowTimes((1, 4, 64), (first, first + more, first + 20 * more)), SECONDS, SECONDS
)
COSTS = st.builds(
    MachineCosts,
    link_bytes_per_s=st.floats(1e8, 1e11),
    pageable_bytes_per_s=st.floats(1e8, 1e11),
    disk_bytes_per_s=st.floats(1e8, 1e10),
    target_layer=TIMES,
    target_head=TIMES,
    substitute_layer=TIMES,
    shared_layer=TIMES,
    draft_head=TIMES,
    low_bit_head=TIMES,
    target_attention=TIMES,
    draft_attention=TIMES,
    step_overhead_s=SECONDS,
    origin=st.just("measured"),
)


@st.composite
def requests(draw: st.DrawFn, **changes: Any) -> PlanRequest:
    geometry = draw(GEOMETRIES)
    most = geometry.model_bytes + 4 * GIB
    device = draw(st.sampled_from(["cpu", "cuda"]))
    request = make_request(
        geometry,
        budget_bytes=draw(st.integers(0, most) | st.integers(0, GIB)),
        device=device,
        costs=draw(COSTS | st.just(assumed_costs(geometry, device))),
        survival=draw(st.none() | st.floats(0.5, 0.99)),
        ram_bytes=draw(st.none() | st.integers(0, most)),
        shadow_rows=draw(st.sampled_from([0, 64])),
        context=draw(CONTEXTS),
        tree_nodes=draw(st.integers(1, 300)),
        cached_rows=draw(st.integers(0, 10_000)),
        samples=draw(st.booleans()),
        tokenizer_bytes=draw(st.integers(0, 20 * MIB)),
        fixed_width=draw(st.none() | st.integers(1, 8)),
    )
    if draw(st.booleans()):
        request = replace(request, substitute_bytes=None)
    return replace(request, **changes)


def plan_or_none(request: PlanRequest) -> OffloadPlan | None:
    return None if refusal(request) else make_plan(request)


def refusal(request: PlanRequest) -> ResourceError | None:
    try:
        make_plan(request)
    except ResourceError as error:
        return error
    return None


def line_bytes(plan: OffloadPlan, label: str) -> int:
    return next((line.size_bytes for line in plan.lines if line.label == label), 0)


@FAST
@given(requests())
def test_a_plan_is_never_above_its_budget_and_every_layer_has_a_place(request: PlanRequest) -> None:
    plan = plan_or_none(request)
    if plan is None:
        return
    assert plan.total_bytes <= request.budget_bytes
    assert sum(line.size_bytes for line in plan.lines) == plan.total_bytes
    assert all(line.size_bytes >= 0 for line in plan.lines)
    assert sorted(plan.resident + plan.streamed) == list(range(request.geometry.layers))
    assert bool(plan.slots) == bool(plan.streamed)
    assert plan.slots != 1
    assert 1 <= plan.context <= request.model_context
    assert set(plan.shared) <= set(plan.resident)
    assert plan.drafts or not plan.shared
    assert 1 <= plan.tree_nodes <= request.tree_nodes
    if request.device == "cuda" and request.ram_bytes is not None:
        assert plan.host_bytes <= request.ram_bytes


@FAST
@given(requests())
def test_every_byte_that_grows_has_a_line(request: PlanRequest) -> None:
    """Each part of the running program is covered by its line, counted here once more from the shapes."""
    plan = plan_or_none(request)
    if plan is None:
        return
    geometry = request.geometry
    rows = plan.context + request.tree_nodes
    if request.substitute_bytes is not None:
        rows += request.shadow_rows
    whole_blocks = -(-rows // SMALL_BLOCK) * SMALL_BLOCK
    assert whole_blocks <= line_bytes(plan, "KV cache") / geometry.kv_row_bytes < rows + 2 * SMALL_BLOCK
    held_row_bytes = (geometry.hidden + geometry.feed_forward) * geometry.element_bytes
    held_rows = line_bytes(plan, "waiting prompt rows") // held_row_bytes
    assert plan.prompt_rows in (plan.context, held_rows + request.prefill_rows)
    assert line_bytes(plan, "resident layers") == len(plan.resident) * geometry.layer_matrix_bytes
    assert plan.streamed_bytes_per_pass == len(plan.streamed) * geometry.layer_matrix_bytes
    on_gpu = request.device == "cuda"
    slot_bytes = geometry.layer_matrix_bytes if on_gpu else max(geometry.block_bytes.values())
    assert line_bytes(plan, "stream slots") >= plan.slots * slot_bytes
    substitutes = geometry.layers - len(plan.shared) if plan.drafts else 0
    sizes = request.substitute_bytes
    assert line_bytes(plan, "substitutes") == (0 if sizes is None else sizes.most(substitutes))
    assert bool(line_bytes(plan, "draft head")) == (plan.draft_head_bits == 4)
    tables = 2 if plan.embedding == "device" else 1
    assert line_bytes(plan, "embedding and head") + line_bytes(plan, "head") == tables * geometry.table_bytes
    assert (plan.embedding == "tied") == geometry.tied_head
    noise_bytes = NOISE_ROWS * geometry.vocab * 8 * request.samples
    assert line_bytes(plan, "sampling noise") == (0 if on_gpu else noise_bytes)
    held = {line.label: line.size_bytes for line in plan.host_lines}
    assert held.get("sampling noise", 0) == (2 * noise_bytes if on_gpu else 0)
    assert line_bytes(plan, "CUDA context") == device_profile(request.device).context_bytes
    assert line_bytes(plan, "libraries") == device_profile(request.device).library_bytes


LABELS = {
    "embedding and head", "head", "draft head", "norms and biases", "resident layers", "substitutes",
    "stream slots", "KV cache", "workspace", "waiting prompt rows", "sampling noise", "CUDA context",
    "libraries", "tokenizer", "kernels", "allocator rounding", "margin",
}  # fmt: skip


@FAST
@given(requests())
def test_every_byte_is_in_exactly_one_line(request: PlanRequest) -> None:
    """What the search prices a choice at is what its lines add up to, for every choice."""
    memory = MemoryModel(request)
    for number, item in enumerate(timed_layouts(request, memory)):
        if number % 97 == 0:
            prompt = memory.prompt_pass(item.layout, 700, number << 16)
            assert 0 <= prompt.held_bytes <= number << 16
            lines = memory.lines(item.layout, 700, prompt)
            labels = [line.label for line in lines]
            assert len(set(labels)) == len(labels)
            assert set(labels) <= LABELS
            assert all(line.size_bytes > 0 for line in lines)
            expected = item.base_bytes + memory.context_bytes(700) + prompt.held_bytes
            assert sum(line.size_bytes for line in lines) == expected


@FAST
@given(requests())
def test_host_memory_holds_the_pinned_layers_the_ring_and_the_table(request: PlanRequest) -> None:
    plan = plan_or_none(request)
    if plan is None:
        return
    held = {line.label: line.size_bytes for line in plan.host_lines}
    if request.device == "cpu":
        assert held == {"bare process": bare_process_bytes(device_profile("cpu"), request.geometry)}
        assert (plan.pinned_layers, plan.ring_slots) == ((), 0)
        return
    layer_bytes = request.geometry.layer_matrix_bytes
    assert set(plan.pinned_layers) <= set(plan.streamed)
    assert held.get("pinned layers", 0) == len(plan.pinned_layers) * layer_bytes
    assert held.get("pinned ring", 0) == plan.ring_slots * layer_bytes
    assert (plan.ring_slots >= 2) == (len(plan.pinned_layers) < len(plan.streamed))
    assert held.get("embedding", 0) == (plan.embedding == "host") * request.geometry.table_bytes


@FAST
@given(requests(), st.integers(0, 4 * GIB))
def test_more_budget_is_never_predicted_slower(request: PlanRequest, more_bytes: int) -> None:
    plan = plan_or_none(request)
    if plan is None:
        return
    richer = make_plan(replace(request, budget_bytes=request.budget_bytes + more_bytes))
    assert richer.prediction.tok_per_s >= plan.prediction.tok_per_s


@FAST
@given(requests(context=None), st.integers(1, 64 * MIB))
def test_one_more_step_of_budget_is_never_predicted_slower(request: PlanRequest, more_bytes: int) -> None:
    """Small steps: where a context grows or a choice of another kind takes over."""
    plan = plan_or_none(request)
    if plan is None:
        return
    richer = make_plan(replace(request, budget_bytes=request.budget_bytes + more_bytes))
    assert richer.prediction.tok_per_s >= plan.prediction.tok_per_s


@FAST
@given(requests(), st.integers(16, 4096), st.integers(16, 4096))
def test_a_longer_context_is_never_predicted_faster(request: PlanRequest, one: int, other: int) -> None:
    short, long = sorted((one, other))
    plan = plan_or_none(replace(request, context=long))
    if plan is None:
        return
    shorter = make_plan(replace(request, context=short))
    assert shorter.prediction.tok_per_s >= plan.prediction.tok_per_s


@FAST
@given(requests(substitute_bytes=None), st.integers(16, 4096), st.integers(16, 4096))
def test_a_longer_context_never_gives_plain_decoding_more_resident_layers(
    request: PlanRequest, one: int, other: int
) -> None:
    short, long = sorted((one, other))
    plan = plan_or_none(replace(request, context=long))
    if plan is None:
        return
    assert make_plan(replace(request, context=short)).resident_layers >= plan.resident_layers


@FAST
@given(requests())
def test_the_context_of_nobodys_choice_costs_little_speed(request: PlanRequest) -> None:
    """Compared with the least that is wanted; below that, only what fits at all decides."""
    plan = plan_or_none(replace(request, context=None))
    if plan is None:
        return
    least = plan_or_none(replace(request, context=min(request.least_context, request.model_context)))
    if least is not None:
        assert plan.prediction.tok_per_s >= 0.97 * least.prediction.tok_per_s


@FAST
@given(requests())
def test_a_prediction_is_of_the_plan_that_it_stands_in(request: PlanRequest) -> None:
    plan = plan_or_none(request)
    if plan is None:
        return
    costs, found = plan.costs(request.costs, request.geometry), plan.prediction
    assert found.step_s == pytest.approx(costs.step_s(2, request.cached_rows))
    assert found.tok_per_s >= found.plain_tok_per_s * 0.999
    assert found.plain_pass_s == pytest.approx(costs.pass_s(1, request.cached_rows), rel=0.03)
    assert found.pass_s <= costs.pass_s(129, request.cached_rows) * 1.03
    assert found.cached_rows == request.cached_rows
    assert (found.depth > 0) <= plan.drafts
    assert found.tau == pytest.approx(sum(found.survival**level for level in range(found.depth + 1)))


LONG_STEPS_AND_FEW_SLOTS = make_request(
    make_geometry(
        layers=34,
        hidden=2432,
        feed_forward=5120,
        heads=8,
        kv_heads=8,
        vocab=61_230,
        tied=False,
        dtype="F32",
    ),
    budget_bytes=2_600_000_000,
    tree_nodes=4,
    tokenizer_bytes=0,
)


@FAST
@given(requests(), st.integers(0, 10_000))
@example(LONG_STEPS_AND_FEW_SLOTS, 3247)
def test_a_prediction_for_other_cached_rows_is_that_of_a_plan_made_for_them(
    request: PlanRequest, cached_rows: int
) -> None:
    plan = plan_or_none(request)
    if plan is None:
        return
    search = LayoutSearch(replace(request, cached_rows=cached_rows))
    fastest = search.fastest(request.budget_bytes, plan.context)
    assert fastest is not None
    costs = plan.costs(request.costs, request.geometry)
    found = predict_at(plan.prediction, costs, cached_rows)
    assert found.cached_rows == cached_rows
    same = predict_at(plan.prediction, costs, request.cached_rows)
    for name in ("plain_pass_s", "pass_s", "step_s", "tau", "plain_tok_per_s", "tok_per_s"):
        assert getattr(same, name) == pytest.approx(getattr(plan.prediction, name), rel=1e-6)
    assert found.tok_per_s <= fastest.tok_per_s * 1.000001, "the best of all layouts for that number"


@FAST
@given(requests(context=2048, substitute_bytes=None), st.integers(0, 4 * GIB))
def test_more_budget_never_means_fewer_resident_layers_for_plain_decoding(
    request: PlanRequest, more_bytes: int
) -> None:
    plan = plan_or_none(request)
    if plan is None:
        return
    richer = make_plan(replace(request, budget_bytes=request.budget_bytes + more_bytes))
    assert richer.resident_layers >= plan.resident_layers


@FEW
@given(requests(ram_bytes=None))
def test_a_budget_that_is_too_small_is_told_one_that_works(request: PlanRequest) -> None:
    error = refusal(request)
    if error is None:
        return
    option = "--memory-gb" if request.device == "cpu" else "--vram-gb"
    stated = re.match(rf"{option} ([0-9.]+) works with a context of (\d+)", error.hint)
    assert stated, error.hint
    enough = replace(request, budget_bytes=int(float(stated[1]) * GIB), context=int(stated[2]))
    assert make_plan(enough).context == int(stated[2])
    # Nor is it much more than needed: two hundredths less are too few (unless the model is so shallow that
    # holding all of it takes less than slots and substitutes).
    less = replace(enough, budget_bytes=int((float(stated[1]) - 0.02) * GIB))
    assert request.geometry.layers < 8 or refusal(less)


def test_the_error_names_the_sizes_and_the_largest_line() -> None:
    with pytest.raises(ResourceError) as caught:
        make_plan(make_request(budget_bytes=100 * MIB))
    assert re.match(
        r"a budget of 100.*MiB is too small: .*GiB is the least, of which substitutes", caught.value.message
    )
    assert "--memory-gb" in caught.value.hint
    assert "--context" not in caught.value.hint


@pytest.mark.parametrize(("bits", "helps"), [(8, True), (4, False), (2, False)])
def test_fewer_bits_are_named_only_where_they_take_less_memory(bits: int, helps: bool) -> None:
    with pytest.raises(ResourceError) as caught:
        make_plan(make_request(budget_bytes=100 * MIB, substitute_bits=bits))
    assert ("substitutes of 4 bits" in caught.value.hint) == helps
    assert "fewer bits" not in caught.value.hint


def test_a_budget_that_is_a_little_too_small_reads_as_less_than_the_least() -> None:
    request = make_request(budget_bytes=100 * MIB)
    with pytest.raises(ResourceError) as caught:
        make_plan(request)
    stated = re.match(r"--\S+ ([0-9.]+) works with a context of (\d+)", caught.value.hint)
    assert stated
    short, works = 0, int(float(stated[1]) * GIB)
    request = replace(request, context=int(stated[2]))
    while works - short > 1:  # the largest budget that is too small
        middle = (short + works) // 2
        refused = refusal(replace(request, budget_bytes=middle))
        short, works = (middle, works) if refused else (short, middle)
    error = refusal(replace(request, budget_bytes=short))
    assert error
    sizes = re.match(r"a budget of (.*) is too small: (.*) is the least", error.message)
    assert sizes
    given, least = (round(parse_size_gib(size) * GIB) for size in sizes.groups())
    assert given < works <= least


def test_a_long_context_that_was_asked_for_is_named_as_a_way_out() -> None:
    request = make_request(make_geometry(kv_heads=12), budget_bytes=GIB, context=32_768)
    with pytest.raises(ResourceError, match="KV cache") as caught:
        make_plan(request)
    assert "a smaller --context" in caught.value.hint


def test_a_budget_for_everything_streams_nothing() -> None:
    plan = make_plan(make_request(budget_bytes=8 * GIB))
    assert plan.fits
    assert plan.streamed == ()
    assert (plan.slots, plan.streamed_bytes_per_pass) == (0, 0)
    assert line_bytes(plan, "stream slots") == 0
    assert isinstance(plan.reason.layers, WholeModel)


def test_what_fits_is_drafted_for_only_where_that_is_faster() -> None:
    request = make_request(budget_bytes=8 * GIB)
    assert make_plan(request).drafts
    slow = RowTimes((1,), (1.0,))
    plan = make_plan(replace(request, costs=replace(request.costs, substitute_layer=slow, shared_layer=slow)))
    assert not plan.drafts
    assert line_bytes(plan, "substitutes") == 0
    assert plan.prediction.depth == 0


def test_the_budget_at_which_the_whole_model_fits_is_exact() -> None:
    ample = make_request(budget_bytes=8 * GIB, context=1024, substitute_bytes=None)
    whole = make_plan(ample).total_bytes
    assert make_plan(replace(ample, budget_bytes=whole)).fits
    assert not make_plan(replace(ample, budget_bytes=whole - 1)).fits


def test_a_budget_for_a_part_streams_the_rest_and_says_why() -> None:
    plan = make_plan(make_request())
    assert not plan.fits
    assert 0 < plan.resident_layers < 28
    assert plan.resident_layers + plan.streamed_layers == 28
    assert isinstance(plan.reason.layers, LayersThatPay)
    assert plan.reason.layers.spare_bytes == plan.budget_bytes - plan.total_bytes


@pytest.mark.parametrize("count", [0, 1, 5])
def test_resident_layers_can_be_asked_for(count: int) -> None:
    plan = make_plan(make_request(resident_layers=count))
    assert plan.resident_layers == count
    assert plan.reason.layers == GivenLayers(count)


def test_streaming_can_be_asked_for_where_all_would_fit() -> None:
    plan = make_plan(make_request(budget_bytes=8 * GIB, resident_layers=0))
    assert plan.streamed_layers == 28
    assert plan.fits


def test_no_4_bit_head_is_planned_for_a_vocabulary_that_no_kernel_takes() -> None:
    """Loading would make none, so a plan that counts one would be of another run."""
    for vocab, takes in ((32_000, True), (32_001, False)):
        found = {layout.draft_head_bits for layout in layouts(make_request(make_geometry(vocab=vocab)))}
        assert (4 in found) is takes


def test_more_resident_layers_than_fit_are_refused() -> None:
    with pytest.raises(ResourceError, match="too small"):
        make_plan(make_request(budget_bytes=GIB, resident_layers=28))


def test_more_layers_than_there_are_and_a_context_beyond_the_models_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="--resident-layers 29: the model has 28 layers"):
        make_plan(make_request(resident_layers=29))
    with pytest.raises(UsageError, match="--context 32769: the model was made for 32768 positions"):
        make_plan(make_request(context=32_769))


def test_the_context_is_cut_to_what_fits_and_that_is_said() -> None:
    wide = make_geometry(kv_heads=12)
    least = min_bytes(make_request(wide, context=DEFAULT_CONTEXT))
    plan = make_plan(make_request(wide, budget_bytes=least - 1))
    assert plan.context < DEFAULT_CONTEXT
    assert plan.reason.context == ShorterContext(plan.context, DEFAULT_CONTEXT, None)


def test_a_context_that_would_cost_speed_is_traded_and_that_is_said() -> None:
    plan = make_plan(make_request(budget_bytes=int(1.6 * GIB)))
    assert 512 <= plan.context < DEFAULT_CONTEXT
    shorter = plan.reason.context
    assert shorter is not None
    assert (shorter.context, shorter.longest) == (plan.context, DEFAULT_CONTEXT)
    assert shorter.loss is not None
    assert shorter.loss > 0.03


def min_bytes(request: PlanRequest) -> int:
    """The smallest budget that works with the context of the request."""
    search = LayoutSearch(request)
    assert request.context is not None
    return search.total_bytes(search.front[0], request.context)


@pytest.mark.parametrize(("model_context", "expected"), [(32_768, DEFAULT_CONTEXT), (512, 512), (100, 100)])
def test_the_default_context_is_the_models_up_to_a_bound(model_context: int, expected: int) -> None:
    plan = make_plan(make_request(budget_bytes=8 * GIB, model_context=model_context))
    assert plan.context == expected
    assert plan.reason.context is None


def test_a_context_that_was_asked_for_is_kept_or_refused_but_never_cut() -> None:
    assert make_plan(make_request(context=8192)).context == 8192
    with pytest.raises(ResourceError):
        make_plan(make_request(make_geometry(kv_heads=12), budget_bytes=GIB, context=32_768))


def test_plain_decoding_spends_the_substitutes_on_resident_layers() -> None:
    with_draft, plain = make_plan(make_request()), make_plan(make_request(substitute_bytes=None))
    assert line_bytes(plain, "substitutes") == 0
    assert plain.resident_layers > with_draft.resident_layers


def test_a_plan_as_plain_values_adds_up() -> None:
    plan = make_plan(make_request())
    values = json.loads(json.dumps(plan.as_dict(reason="as it is", assumptions=())))
    assert values["planned_bytes"] == sum(line["size_bytes"] for line in values["lines"]) == plan.total_bytes
    assert values["resident_layers"] == list(plan.resident)
    assert values["streamed_layers"] == list(plan.streamed)
    assert values["reason"] == "as it is"


def test_layers_used_by_the_target_alone_keep_their_substitutes() -> None:
    """The facts' rule: 16-bit reads in every draft step cost more than the substitute's place is worth."""
    plan = make_plan(make_request(budget_bytes=2 * GIB))
    assert plan.resident
    assert plan.shared == ()
    assert line_bytes(plan, "substitutes") == 28 * make_request().substitute_bytes.largest
    assert plan.reason.draft is not None
    assert not plan.reason.draft.shares


def test_layers_are_shared_where_the_link_is_so_slow_that_every_byte_counts() -> None:
    slow = replace(assumed_costs(make_geometry(), "cpu"), link_bytes_per_s=1e7, disk_bytes_per_s=1e7)
    plan = make_plan(make_request(costs=slow))
    assert plan.shared == plan.resident
    assert plan.reason.draft is not None
    assert plan.reason.draft.shares


def test_layers_that_host_memory_does_not_hold_come_from_disk() -> None:
    gpu = make_request(make_geometry(tied=False), device="cuda", budget_bytes=3 * GIB)
    plan = make_plan(gpu)
    assert plan.pinned_layers == plan.streamed
    assert plan.ring_slots == 0
    scarce = make_plan(replace(gpu, ram_bytes=plan.host_bytes - GIB))
    assert 0 < len(scarce.pinned_layers) < len(scarce.streamed)
    assert scarce.ring_slots >= 2
    assert plan.host_bytes - 2 * GIB < scarce.host_bytes <= plan.host_bytes - GIB
    assert scarce.prediction.tok_per_s < plan.prediction.tok_per_s


def test_too_little_host_memory_names_what_works() -> None:
    gpu = make_request(device="cuda", ram_bytes=GIB, budget_bytes=3 * GIB)
    with pytest.raises(ResourceError, match="host memory are too little") as caught:
        make_plan(gpu)
    stated = re.match(r"--ram-gb ([0-9.]+) works", caught.value.hint)
    assert stated
    make_plan(replace(gpu, ram_bytes=int(float(stated[1]) * GIB)))


def test_the_untied_embedding_stays_in_host_memory_until_all_layers_are_held() -> None:
    untied = make_geometry(tied=False)
    assert make_plan(make_request(untied, device="cuda", budget_bytes=3 * GIB)).embedding == "host"
    assert make_plan(make_request(untied, device="cuda", budget_bytes=16 * GIB)).embedding == "device"
    assert make_plan(make_request(untied)).embedding == "disk"


def test_a_low_bit_head_is_taken_where_it_pays_and_counted() -> None:
    plan = make_plan(make_request())
    assert plan.draft_head_bits == 4
    assert line_bytes(plan, "draft head") == substitute_head_bytes(make_geometry())
    costs = assumed_costs(make_geometry(), "cpu")
    same = make_plan(make_request(costs=replace(costs, low_bit_head=costs.draft_head)))
    assert same.draft_head_bits == 16


@pytest.mark.parametrize("link_gb_per_s", [1.2, 2.2])
def test_on_a_cpu_no_resident_layer_is_planned_before_the_4_bit_head(link_gb_per_s: float) -> None:
    """A draft step reads the head, a pass reads the layer: a round has many steps."""
    geometry = make_geometry(layers=10, vocab=32_000)
    request = make_request(geometry, costs=assumed_costs(geometry, "cpu", link_gb_per_s))
    drafting = [item.layout for item in LayoutSearch(request).front if item.depth.depth]
    assert {layout.draft_head_bits for layout in drafting if layout.resident} == {4}
    assert sum(layout.draft_head_bits == 16 for layout in drafting) < 4


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_along_all_budgets_no_step_is_predicted_slower(device: str) -> None:
    """Without a context of the user's, so that context grows at some steps and layers at others."""
    request = make_request(make_geometry(layers=10, kv_heads=6, vocab=32_000), device=device)
    search = LayoutSearch(request)
    sizes = range(search.front[0].base_bytes, search.front[-1].base_bytes + GIB // 2, 3 * MIB)
    found = [option for size in sizes if (option := search.best(size)) is not None]
    speeds = [option.timed.tok_per_s for option in found]
    assert speeds == sorted(speeds)
    assert len(set(speeds)) > 10
    contexts = [option.context for option in found]
    assert contexts[-1] == DEFAULT_CONTEXT
    assert contexts != sorted(contexts), "a context was given away for speed at some step"


def test_of_several_sets_of_substitutes_the_fastest_is_taken() -> None:
    geometry = make_geometry()

    def of_bits(bits: int, budget_bytes: int) -> PlanRequest:
        substitutes = SubstituteSettings(bits, "minmax")
        return make_request(
            substitute_bytes=LayerSizes(substitute_layer_bytes(geometry, substitutes)),
            substitute_bits=bits,
            costs=assumed_costs(geometry, "cpu", settings=substitutes),
            budget_bytes=budget_bytes,
        )

    number, plan = fastest_plan([of_bits(8, 2 * GIB), of_bits(4, 2 * GIB), of_bits(2, 2 * GIB)])
    assert (number, plan.substitute_bits) == (1, 4)
    assert plan.reason.substitutes == FasterBits(4, (2, 8))
    # What one set cannot hold, another may; and of equals the most recent wins.
    assert fastest_plan([of_bits(8, int(1.5 * GIB)), of_bits(4, int(1.5 * GIB))])[0] == 1
    assert fastest_plan([of_bits(4, 2 * GIB), of_bits(4, 2 * GIB)])[0] == 0
    with pytest.raises(ResourceError):
        fastest_plan([of_bits(8, GIB // 2), of_bits(4, GIB // 2)])


def test_a_fixed_depth_is_predicted_as_it_is() -> None:
    assert make_plan(make_request(fixed_depth=5)).prediction.depth == 5


@FAST
@given(requests())
def test_a_plan_decides_the_rows_that_the_cache_has_beside_the_context(request: PlanRequest) -> None:
    plan = plan_or_none(request)
    if plan is None:
        return
    assert plan.scratch_rows == plan.tree_nodes + plan.shadow_rows <= request.scratch_rows
    assert plan.shadow_rows == (request.shadow_rows if plan.streamed and plan.drafts else 0)
    assert plan.draft_rows == MOST_ROWS


@pytest.mark.parametrize(
    "fixed", [{"fixed_depth": 2}, {"fixed_width": 1}, {"fixed_depth": 40, "fixed_width": 2}]
)
def test_a_fixed_shape_gets_all_the_nodes_that_were_counted_for_it(fixed: dict[str, int]) -> None:
    request = make_request(tree_nodes=300)
    assert make_plan(request).tree_nodes < 300
    assert make_plan(replace(request, **fixed)).tree_nodes == 300


def test_planning_weighs_a_bounded_number_of_choices() -> None:
    """A few milliseconds each thousand: an 80-layer model is planned in the blink of an eye."""
    large = make_geometry(layers=80, hidden=8192, feed_forward=28_672, heads=64, kv_heads=8, tied=False)
    for device in ("cpu", "cuda"):
        request = make_request(large, device=device, budget_bytes=48 * GIB)
        assert sum(1 for _ in timed_layouts(request, MemoryModel(request))) < 3000


def test_there_are_as_many_slots_as_memory_allows() -> None:
    """They keep the link busy during draft steps, and what they hold when a pass begins need not be waited for."""
    streaming = make_request(resident_layers=0, context=1024)
    assert make_plan(streaming).slots == 8
    assert make_plan(replace(streaming, budget_bytes=min_bytes(streaming))).slots == 2
    assert make_plan(replace(make_request(device="cuda"), budget_bytes=3 * GIB)).slots in (2, 3)


def test_resident_layers_are_spread_evenly() -> None:
    """The link works on while resident layers compute: gaps between them differ by at most one."""
    for layers in range(1, 60):
        for count in range(layers + 1):
            chosen = spread(count, layers)
            assert len(set(chosen)) == len(chosen) == count
            assert list(chosen) == sorted(chosen)
            assert all(0 <= layer < layers for layer in chosen)
            gaps = [right - left for left, right in pairwise(chosen)]
            assert not gaps or max(gaps) - min(gaps) <= 1, (count, layers)


def test_a_single_resident_layer_is_in_the_middle() -> None:
    assert spread(1, 9) == (4,)
    assert spread(3, 3) == (0, 1, 2)
    assert spread(0, 5) == ()
