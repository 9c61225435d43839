"""The loop's bookkeeping over fakes: prefill chunks, the end of the context, and what the figures say."""

import itertools

import pytest
from fakes import (
    PASS_BYTES,
    VOCAB,
    FakeDraft,
    FakeTarget,
    ScriptedDrafter,
    chain_of,
    emitted,
    fake_cache,
    fake_engine,
    free_policy,
    plain_answer,
    request_for,
)
from test_decoding_engine import BOTH, DRAFTS, PROMPT, TABLE, check_cache, check_next_turn, machine

from subspec_cli.decoding.drafter import PlainDrafter
from subspec_cli.decoding.engine import common_prefix
from subspec_cli.decoding.row_groups import prompt_groups
from subspec_cli.drafting.draft_steps import DirectSteps
from subspec_cli.drafting.history import History
from subspec_cli.drafting.tree_drafter import TreeDrafter
from subspec_cli.errors import UsageError
from subspec_cli.limits import PREFILL_CHUNK


def spans(target):
    return [(call.batch.start, call.batch.start + call.batch.rows) for call in target.calls]


def test_prefill_chunks_end_at_fixed_positions():
    first, second = PREFILL_CHUNK, 2 * PREFILL_CHUNK
    prompt = tuple(n % VOCAB for n in range(second + 9))
    engine, target, _ = machine(context=3 * PREFILL_CHUNK)
    assert emitted(list(engine.generate(request_for(prompt, 1)))) == plain_answer(TABLE, prompt, 1)
    assert spans(target) == [(0, first), (first, second), (second, second + 9)]
    target.calls.clear()
    changed = (*prompt[: first - 3], 11, *prompt[first - 2 :])
    list(engine.generate(request_for(changed, 1)))
    assert spans(target) == [(first - 3, first), (first, second), (second, second + 9)]


def test_chunks_are_gapless_and_end_at_multiples():
    for start in (0, 1, PREFILL_CHUNK - 1, PREFILL_CHUNK, PREFILL_CHUNK + 1):
        groups = list(prompt_groups([1] * 3000, start))
        assert [group.start for group in groups] == [start, *(g.start + g.rows for g in groups[:-1])]
        assert groups[-1].start + groups[-1].rows == 3000
        assert all(group.start % PREFILL_CHUNK == 0 for group in groups[1:])
        assert all(group.path is None for group in groups)


@pytest.mark.parametrize(("most", "expected"), [(1 << 20, 1), (521, 1), (520, 2), (264, 3), (10, 3)])
def test_a_prompt_takes_as_few_passes_as_its_workspace_allows(most, expected):
    prompt = tuple(n % VOCAB for n in range(2 * PREFILL_CHUNK + 9))
    kv, target = fake_cache(3 * PREFILL_CHUNK), FakeTarget(TABLE)
    engine = fake_engine(target, kv, PlainDrafter(), prompt_rows=most)
    outputs = list(engine.generate(request_for(prompt, 5)))
    assert emitted(outputs) == plain_answer(TABLE, prompt, 5)
    assert outputs[0].stats.prefill_passes == expected
    check_cache(kv, prompt, emitted(outputs))


def test_an_interrupted_pass_over_a_prompt_keeps_what_was_committed():
    kv, target = fake_cache(3 * PREFILL_CHUNK), FakeTarget(TABLE)
    engine = fake_engine(target, kv, PlainDrafter())
    list(engine.generate(request_for(PROMPT, 4)))
    before = kv.token_ids
    target.fails_at = len(target.calls) + 1
    longer = (*before, *(n % VOCAB for n in range(2 * PREFILL_CHUNK)))
    with pytest.raises(OSError, match="the disk is gone"):
        list(engine.generate(request_for(longer, 4)))
    assert kv.token_ids == before
    target.fails_at = None
    assert emitted(list(engine.generate(request_for(longer, 4)))) == plain_answer(TABLE, longer, 4)


@pytest.mark.parametrize("passes", [1, 2])
def test_every_layer_of_a_prompt_is_reported_without_the_rows_that_are_reused(passes):
    prompt = tuple(n % VOCAB for n in range(PREFILL_CHUNK + 80))
    kv, target = fake_cache(3 * PREFILL_CHUNK), FakeTarget(TABLE)
    engine = fake_engine(target, kv, PlainDrafter(), prompt_rows=1 << 20 if passes == 1 else 1)
    told = []
    list(engine.generate(request_for(prompt[:100], 1)))
    list(engine.generate(request_for(prompt, 1), told.append))
    whole, first = len(prompt) - 100, PREFILL_CHUNK - 100
    layers = [whole / 2, whole] if passes == 1 else [first / 2, first, (first + whole) / 2, whole]
    assert [(item.done_tokens, item.tokens) for item in told] == [(done, whole) for done in layers]
    assert told == sorted(told, key=lambda item: item.elapsed_s)


@pytest.mark.parametrize("length", [PREFILL_CHUNK - 1, PREFILL_CHUNK, PREFILL_CHUNK + 1])
def test_a_prompt_about_as_long_as_a_chunk(length):
    prompt = tuple(n % VOCAB for n in range(length))
    engine, _, kv = machine(TABLE, context=2 * PREFILL_CHUNK)
    outputs = list(engine.generate(request_for(prompt, 4)))
    assert emitted(outputs) == plain_answer(TABLE, prompt, 4)
    assert outputs[0].stats.prefilled_tokens == length
    check_cache(kv, prompt, emitted(outputs))


@BOTH
def test_a_prompt_that_leaves_no_room_is_refused_and_changes_nothing(draft):
    engine, _, kv = machine(draft, context=16)
    list(engine.generate(request_for(PROMPT, 3)))
    before = kv.token_ids
    with pytest.raises(UsageError, match="the prompt has 16 tokens, the context holds 16"):
        next(engine.generate(request_for([1] * 16, 3)))
    assert kv.token_ids == before
    check_next_turn(*machine(draft, context=30), PROMPT)


@BOTH
def test_an_answer_may_fill_the_context(draft):
    engine, _, kv = machine(draft, context=16)
    room = 16 - len(PROMPT)
    outputs = list(engine.generate(request_for(PROMPT, room)))
    assert emitted(outputs) == plain_answer(TABLE, PROMPT, room)
    assert outputs[-1].finish_reason == "length"
    assert kv.committed == 15


@BOTH
def test_a_prompt_of_all_but_one_row_gives_one_token(draft):
    prompt = (*range(10), 0, 1, 2, 3, 4)
    engine, _, kv = machine(draft, context=16)
    assert emitted(list(engine.generate(request_for(prompt, 1)))) == plain_answer(TABLE, prompt, 1)
    assert kv.committed == 15


def test_common_prefix():
    assert common_prefix((), (1,)) == 0
    assert common_prefix((1, 2, 3), (1, 2)) == 2
    assert common_prefix((1, 2, 3), (1, 9, 3)) == 1


# --- accounts ---------------------------------------------------------------------------------------------------


def test_the_drafter_is_given_how_many_tokens_are_still_wanted():
    answer = plain_answer(TABLE, PROMPT, 40)
    kv, target = fake_cache(), FakeTarget(TABLE)
    grower = ScriptedDrafter(lambda root, wanted: chain_of([root, *answer[kv.committed - 4 :][:2]]))
    list(fake_engine(target, kv, grower).generate(request_for(PROMPT, 9)))
    assert grower.wanted == [8, 5, 2]


def test_stats_add_up():
    engine, target, _ = machine(DRAFTS["close"])
    outputs = list(engine.generate(request_for(PROMPT, 30)))
    last = outputs[-1].stats
    assert last.prompt_tokens == last.prefilled_tokens == len(PROMPT)
    assert last.new_tokens == 30
    assert last.passes == len(outputs) - 1 == len(target.calls) - 1
    assert last.tau == pytest.approx(29 / last.passes)
    assert sum(last.accepted_histogram) == last.passes
    assert last.drafted_tokens == sum(call.batch.rows - 1 for call in target.calls[1:])
    assert last.streamed_bytes == PASS_BYTES * last.passes
    assert last.wait_time_s == last.passes
    assert last.ttft_s > 0
    assert 0 < last.draft_time_s + last.verify_time_s <= last.decode_time_s
    for before, after in itertools.pairwise(outputs):
        assert after.stats.new_tokens == before.stats.new_tokens + len(after.token_ids)
        assert after.stats.decode_time_s > before.stats.decode_time_s


def test_the_time_that_the_consumer_takes_is_not_decode_time(monkeypatch):
    clock = itertools.count(0, 1)
    monkeypatch.setattr("subspec_cli.decoding.meter.time.perf_counter", lambda: float(next(clock)))
    engine, _, _ = machine()
    times = []
    for output in engine.generate(request_for(PROMPT, 4)):
        times.append(output.stats.decode_time_s)
        for _ in range(1000):
            next(clock)
    assert times[-1] < 100


def test_the_drafter_learns_from_every_pass():
    seen = []

    class Watching(History):
        def observe(self, tree, result, rankings, *, round_s):
            seen.append((len(tree), len(result.accepted_nodes)))

    kv, plan = fake_cache(64, scratch=128), free_policy(4, 1, 5, fixed_width=True)
    drafter = TreeDrafter(DirectSteps(FakeDraft(TABLE)), plan, eos_ids=(), history=Watching())
    list(fake_engine(FakeTarget(TABLE), kv, drafter).generate(request_for(PROMPT, 11)))
    assert seen == [(5, 5), (5, 5)]
