"""The decode loop over fakes: same tokens with and without a draft, and a cache that is right after any stop."""

import itertools

import numpy as np
import pytest
from fakes import (
    VOCAB,
    ByteTokenizer,
    FakeDraft,
    FakeTarget,
    GreedySampler,
    ScriptedDrafter,
    blended,
    chain_of,
    collect,
    emitted,
    fake_cache,
    fake_engine,
    free_policy,
    plain_answer,
    policy,
    random_table,
    request_for,
    sampled,
    scripted,
    steps_of,
    tree_of,
)
from test_decoding_text import CASES, EOS, ids

from subspec_cli.decoding.drafter import PlainDrafter
from subspec_cli.decoding.engine import Request, common_prefix
from subspec_cli.decoding.text import AnswerText
from subspec_cli.drafting.tree_drafter import TreeDrafter
from subspec_cli.errors import IntegrityError

TABLE = random_table(1)
PROMPT = (3, 1, 4, 1, 5)
BYTES = ByteTokenizer([bytes([value]) for value in range(256)])


def always_wrong(prefix):
    return -TABLE(prefix)


def constant(prefix):
    return np.eye(VOCAB)[2] * 9


DRAFTS = {
    "itself": TABLE,
    "close": blended(TABLE, random_table(2), 0.3),
    "stranger": random_table(3),
    "always wrong": always_wrong,
    "constant": constant,
    "damaged": lambda prefix: np.full(VOCAB, np.nan),
}


def machine(draft_table=None, *, table=TABLE, eos_ids=(), plan=None, context=64, ahead=0):
    """(engine, target, kv): plain without a draft table, else with the real drafter."""
    kv, target, plan = fake_cache(context, scratch=128), FakeTarget(table), plan or free_policy(6, 3, 24)
    drafter = PlainDrafter()
    if draft_table is not None:
        drafter = TreeDrafter(steps_of(FakeDraft(draft_table), ahead), plan, eos_ids=eos_ids)
    return fake_engine(target, kv, drafter), target, kv


def check_cache(kv, prompt, tokens):
    """Rows of the prompt and of all emitted tokens but the newest, which is the root of the next tree."""
    assert kv.token_ids == (*prompt, *tokens[:-1])


@pytest.mark.parametrize(
    "sampler", [GreedySampler(), sampled(1), sampled(2, temperature=0.7, top_p=0.8, top_k=5)]
)
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("ahead", [0, 1])
def test_speculation_changes_no_token(ahead, draft, sampler):
    expected = plain_answer(TABLE, PROMPT, 40, sampler)
    for plan in (None, policy(9, 4, 30), policy(9, 4, 30, shadow_rows=40), free_policy(3, 2, 9)):
        engine, _, kv = machine(plan and DRAFTS[draft], plan=plan, ahead=ahead)
        outputs = list(engine.generate(request_for(PROMPT, 40, sampler=sampler)))
        assert emitted(outputs) == expected
        assert [output.finish_reason for output in outputs] == [None] * (len(outputs) - 1) + ["length"]
        check_cache(kv, PROMPT, expected)


def test_speculation_under_the_cost_rule_changes_no_token():
    for draft in DRAFTS.values():
        engine, _, _ = machine(draft, plan=policy(8, 3, 30))
        assert emitted(list(engine.generate(request_for(PROMPT, 50)))) == plain_answer(TABLE, PROMPT, 50)


def test_a_draft_that_is_the_target_is_taken_whole():
    """F88, with tau as it is defined: tokens after the first, per pass."""
    engine, target, _ = machine(TABLE, plan=free_policy(4, 1, 5))
    last = list(engine.generate(request_for(PROMPT, 31)))[-1].stats
    assert last.passes == 6
    assert last.tau == 5
    assert last.accepted_histogram == (0, 0, 0, 0, 6)
    assert len(target.calls) == 7


def test_every_pass_counts_the_rows_that_were_committed_before_it():
    for draft_table, tokens, cached in ((None, 5, (5, 6, 7, 8)), (TABLE, 13, (5, 9, 13))):
        plan = free_policy(3, 1, 4)
        engine, _, _ = machine(draft_table, plan=plan)
        last = list(engine.generate(request_for(PROMPT, tokens)))[-1].stats
        assert (last.passes, last.cached_rows) == (len(cached), sum(cached))
        assert last.by_cached_rows[0].passes == last.passes


def test_a_draft_that_is_always_wrong_gives_one_token_a_pass():
    engine, _, _ = machine(always_wrong, plan=free_policy(4, 1, 5))
    last = list(engine.generate(request_for(PROMPT, 10)))[-1].stats
    assert last.tau == 1
    assert last.accepted_histogram == (9,)
    assert last.drafted_tokens > 9


@pytest.mark.parametrize("beside", [False, True], ids=["chain", "second branch"])
@pytest.mark.parametrize("pattern", list(itertools.product(range(7), repeat=2)))
def test_every_acceptance_pattern(pattern, beside):
    """Chains of six that are right for so long, pass after pass; or with the right path beside a wrong one."""
    answer = plain_answer(TABLE, PROMPT, 60)
    passes = itertools.cycle(pattern)
    kv, target = fake_cache(80), FakeTarget(TABLE)

    def propose(root, wanted):
        done = kv.committed - len(PROMPT)
        assert answer[done] == root
        right = next(passes)
        coming = answer[done + 1 : done + 7]
        path = [*coming[:right], *((token + 1) % VOCAB for token in coming[right:])]
        if not beside:
            return chain_of([root, *path])
        wrong = [(coming[0] + 2) % VOCAB, 0, 0]
        return tree_of([root, *wrong, *path], [-1, 0, 1, 2, 0, 4, 5, 6, 7, 8])

    engine = fake_engine(target, kv, ScriptedDrafter(propose))
    outputs = list(engine.generate(request_for(PROMPT, 30)))
    assert emitted(outputs) == answer[:30]
    assert [len(output.token_ids) for output in outputs[1:3]] == [accepted + 1 for accepted in pattern]
    check_cache(kv, PROMPT, answer[:30])


@pytest.mark.parametrize("limit", range(1, 16))
def test_the_limit_is_met_exactly_wherever_it_falls(limit):
    """F81: also inside an accepted path longer than what is wanted."""
    answer = plain_answer(TABLE, PROMPT, 40)
    kv, target = fake_cache(), FakeTarget(TABLE)
    drafter = ScriptedDrafter(lambda root, wanted: chain_of([root, *answer[kv.committed - 4 :][:7]]))
    for engine in (fake_engine(target, kv, drafter), machine(TABLE)[0], machine()[0]):
        outputs = list(engine.generate(request_for(PROMPT, limit)))
        assert emitted(outputs) == answer[:limit]
        assert outputs[-1].finish_reason == "length"
        assert outputs[-1].stats.new_tokens == limit
    check_cache(kv, PROMPT, answer[:limit])


@pytest.mark.parametrize("at", range(1, 14))
@pytest.mark.parametrize("draft", [None, TABLE, DRAFTS["close"]], ids=["plain", "itself", "close"])
def test_nothing_comes_after_an_end_token_wherever_it_falls(draft, at):
    """F80: two end tokens, at every place of the draft window, also as the last token allowed."""
    script = [n % 9 for n in range(at - 1)] + [10 + at % 2] + [1] * 9
    table = scripted(script, TABLE, prompt_tokens=len(PROMPT))
    draft = draft and scripted(script, draft, prompt_tokens=len(PROMPT))
    for limit in (at, at + 20):
        engine, _, kv = machine(draft, table=table, eos_ids=(10, 11))
        outputs = list(engine.generate(request_for(PROMPT, limit, eos_ids=(10, 11))))
        assert emitted(outputs) == script[:at]
        assert outputs[-1].finish_reason == "stop"
        check_cache(kv, PROMPT, script[:at])


ARMS = {
    "plain": None,
    "one deep": lambda: free_policy(1, 1, 2),
    "two deep": lambda: free_policy(2, 2, 6),
    "seven deep": lambda: free_policy(7, 2, 20),
    "twenty deep": lambda: free_policy(20, 1, 24),
    "in the shadow": lambda: free_policy(3, 2, 8, shadow_rows=24),
    "by cost": lambda: policy(12, 4, 32, shadow_rows=24),
}


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("name", CASES)
def test_the_table_of_endings_holds_with_and_without_a_draft(name, arm):
    """F80, F81, F82: text, finish reason, count and cache are those of one token at a time."""
    text, stop, limit, expected, finish, count = CASES[name]
    table = scripted(ids(text), lambda prefix: np.arange(257) / 99.0, prompt_tokens=len(PROMPT), vocab=257)
    plan = ARMS[arm] and ARMS[arm]()
    engine, _, kv = machine(table if plan else None, table=table, eos_ids=(EOS,), plan=plan)
    answer = AnswerText(BYTES, eos_ids={EOS}, stop=stop, max_new_tokens=limit)
    outputs, shown = [], ""
    for output in engine.generate(Request(PROMPT, GreedySampler(), limit, answer)):
        outputs.append(output)
        shown += answer.take()
    assert (shown, outputs[-1].finish_reason, len(emitted(outputs))) == (expected, finish, count)
    check_cache(kv, PROMPT, emitted(outputs))


# --- after a stop -----------------------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize("draft", [None, DRAFTS["close"]], ids=["plain", "speculative"])


def check_next_turn(engine, target, kv, prompt):
    """Another turn keeps the longest common prefix and answers as a fresh machine does."""
    kept = min(common_prefix(prompt, kv.token_ids), len(prompt) - 1)
    calls = len(target.calls)
    outputs = list(engine.generate(request_for(prompt, 12)))
    assert target.calls[calls].batch.start == kept
    assert outputs[0].stats.prompt_tokens == len(prompt)
    assert outputs[-1].stats.prefilled_tokens == len(prompt) - kept
    assert emitted(outputs) == plain_answer(TABLE, prompt, 12)
    check_cache(kv, prompt, emitted(outputs))


@BOTH
@pytest.mark.parametrize("taken", range(1, 7))
def test_a_consumer_that_leaves_early_leaves_a_usable_cache(draft, taken):
    engine, target, kv = machine(draft)
    steps = engine.generate(request_for(PROMPT, 40))
    tokens = emitted([next(steps) for _ in range(taken)])
    steps.close()
    check_cache(kv, PROMPT, tokens)
    check_next_turn(engine, target, kv, (*PROMPT, *tokens, 7, 8))


@BOTH
@pytest.mark.parametrize("fails_at", [1, 2, 4])
def test_a_pass_that_fails_leaves_a_usable_cache(draft, fails_at):
    engine, target, kv = machine(draft)
    target.fails_at = fails_at
    tokens = []
    with pytest.raises(OSError, match="the disk is gone"):
        collect(engine.generate(request_for(PROMPT, 60)), tokens)
    check_cache(kv, PROMPT, tokens)
    target.fails_at = None
    check_next_turn(engine, target, kv, (*PROMPT, *tokens, 7, 8))


@BOTH
def test_a_prefill_that_fails_leaves_a_usable_cache(draft):
    engine, target, kv = machine(draft)
    target.fails_at = 0
    with pytest.raises(OSError, match="the disk is gone"):
        next(engine.generate(request_for(PROMPT, 5)))
    assert kv.token_ids == ()
    target.fails_at = None
    check_next_turn(engine, target, kv, PROMPT)


@BOTH
def test_an_interrupted_pass_leaves_a_usable_cache(draft):
    """Ctrl-C may fall into the middle of a pass; the tokens shown so far stay."""
    engine, target, kv = machine(draft)
    layers = target.layers

    def interrupted(flow):
        for layer in layers(flow):
            if len(target.calls) == 4:
                raise KeyboardInterrupt
            yield layer

    target.layers = interrupted
    tokens = []
    with pytest.raises(KeyboardInterrupt):
        collect(engine.generate(request_for(PROMPT, 60)), tokens)
    target.layers = layers
    check_cache(kv, PROMPT, tokens)
    check_next_turn(engine, target, kv, (*PROMPT, *tokens, 7))


@BOTH
def test_logits_that_are_not_finite_stop_before_a_token_is_shown(draft):
    """F85: never token 0, which is what an argmax of NaN would give."""
    answer = plain_answer(TABLE, PROMPT, 40)

    def damaged(prefix):
        bad = len(prefix) > len(PROMPT) + 9
        return np.full(VOCAB, np.nan) if bad else TABLE(prefix)

    engine, _, kv = machine(draft, table=damaged)
    tokens = []
    with pytest.raises(IntegrityError, match=f"position {len(PROMPT) + 9}"):
        collect(engine.generate(request_for(PROMPT, 40)), tokens)
    assert tokens == answer[: len(tokens)]
    assert len(tokens) <= 10
    check_cache(kv, PROMPT, tokens)


@BOTH
@pytest.mark.parametrize(
    "prompt",
    [
        PROMPT,
        PROMPT[:2],
        (*PROMPT[:3], 9, 9),
        (8, 8),
        (*PROMPT, 0),
        (*PROMPT, *plain_answer(TABLE, PROMPT, 9), 2),
    ],
    ids=["same", "shorter", "differs inside", "differs at once", "longer", "goes on"],
)
def test_the_next_prompt_reuses_what_it_shares(draft, prompt):
    engine, target, kv = machine(draft)
    list(engine.generate(request_for(PROMPT, 9)))
    check_next_turn(engine, target, kv, prompt)


def test_turns_after_different_stops_agree_in_both_modes():
    """Whatever ended a turn, the ids of the next ones are those of a fresh session."""
    engines = [machine(draft) for draft in (None, TABLE, DRAFTS["close"])]
    prompt = PROMPT
    for limit, eos_ids in ((7, ()), (30, (5, 6)), (1, ()), (12, ())):
        found = []
        for engine, _, kv in engines:
            outputs = list(engine.generate(request_for(prompt, limit, eos_ids=eos_ids)))
            found.append((emitted(outputs), kv.token_ids, outputs[0].stats.prefilled_tokens))
        assert found == [found[0]] * 3
        tokens = found[0][0]
        assert tokens == plain_answer(TABLE, prompt, len(tokens))
        prompt = (*prompt, *tokens, 7)[:40]
