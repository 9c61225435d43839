"""Rounds over several answers: whoever comes, goes or fails beside an answer, its tokens are those it has alone."""

import random
from types import SimpleNamespace

import pytest
from fakes import (
    VOCAB,
    FakeDraft,
    FakeTarget,
    GreedySampler,
    blended,
    chain_of,
    fake_cache,
    free_policy,
    plain_answer,
    plan_costs,
    policy,
    random_table,
    request_for,
    sampled,
    steps_of,
)

from subspec_cli.decoding.drafter import PlainDrafter
from subspec_cli.decoding.engine import Engine
from subspec_cli.drafting.step_queue import merged
from subspec_cli.drafting.tree_drafter import TreeDrafter
from subspec_cli.errors import UsageError
from subspec_cli.limits import PREFILL_CHUNK

TABLE = random_table(1)
DRAFT = blended(TABLE, random_table(7), 0.3)
PROMPTS = [(1, 2, 3), (5, 6), (7, 8, 9, 10, 1), (3,), (2, 4, 6, 8), (9, 9)]

pytestmark = pytest.mark.usefixtures("checked_trees")


def engine_of(plan=None, *, ahead=0, draft=DRAFT, prompt_rows=1 << 20, company_rows=0):
    target = FakeTarget(TABLE)
    drafter = (
        PlainDrafter() if plan is None else TreeDrafter(steps_of(FakeDraft(draft), ahead), plan, eos_ids=())
    )
    engine = Engine(
        target, drafter, counters=target.counters, prompt_rows=prompt_rows, company_rows=company_rows
    )
    return engine, target


def caches(count, context=96):
    return [fake_cache(context, scratch=160) for _ in range(count)]


def answer_all(engine, requests, kvs):
    """Tokens of requests that begin together and are answered together."""
    answers = [engine.join(request, kv) for request, kv in zip(requests, kvs, strict=True)]
    tokens = {id(answer): [] for answer in answers}
    while in_flight := [answer for answer in answers if not answer.has_ended]:
        for answer, output in engine.round(in_flight):
            tokens[id(answer)].extend(output.token_ids)
    return [tokens[id(answer)] for answer in answers], answers


PLANS = {
    "plain": None,
    "chains": free_policy(6, 1, 7),
    "trees": free_policy(5, 3, 20),
    "by cost": policy(9, 8, 24, costs=plan_costs(0.01, 0.5), shadow_rows=60),
}


@pytest.mark.parametrize("sampler", [None, 3])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("ahead", [0, 1])
def test_answers_in_company_are_those_alone(ahead, plan, sampler):
    engine, _ = engine_of(PLANS[plan], ahead=ahead)
    samplers = [GreedySampler() if sampler is None else sampled(sampler + n) for n in range(len(PROMPTS))]
    limits = [30, 7, 21, 1, 40, 12]
    requests = [
        request_for(prompt, limit, sampler=own)
        for prompt, limit, own in zip(PROMPTS, limits, samplers, strict=True)
    ]
    kvs = caches(len(PROMPTS))
    tokens, answers = answer_all(engine, requests, kvs)
    for found, prompt, limit, own, kv in zip(tokens, PROMPTS, limits, samplers, kvs, strict=True):
        assert found == plain_answer(TABLE, prompt, limit, own)
        assert kv.token_ids == (*prompt, *found[:-1])
    if plan == "by cost":
        assert sum(answer.output.stats.shadow_steps for answer in answers) > 0


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ahead", [0, 1])
def test_random_arrivals_departures_and_failures_change_no_token(ahead, seed):
    """Seats are taken over by the next answer; a round that fails is run again, or its answers are begun anew."""
    chance = random.Random(seed)
    plan = chance.choice([PLANS["trees"], PLANS["by cost"], free_policy(4, 2, 9, shadow_rows=30)])
    engine, target = engine_of(plan, ahead=ahead)
    free, in_flight, wanted, done = caches(3), {}, list(range(14)), []
    while wanted or in_flight:
        while wanted and free and chance.random() < 0.6:
            number, kv = wanted.pop(), free.pop()
            prompt = tuple(chance.randrange(VOCAB) for _ in range(chance.randint(1, 9)))
            sampler = sampled(number) if number % 2 else GreedySampler()
            answer = engine.join(request_for(prompt, chance.randint(1, 30), sampler=sampler), kv)
            in_flight[number] = (answer, prompt, sampler, [])
        answers = [answer for answer, *_ in in_flight.values() if chance.random() < 0.8]
        if not answers:
            continue
        target.fails_at = len(target.calls) + 1 if chance.random() < 0.1 else None
        tokens = {id(answer): found for answer, _, _, found in in_flight.values()}
        try:
            for answer, output in engine.round(answers):
                tokens[id(answer)].extend(output.token_ids)
        except OSError:
            target.fails_at = None
        for number, (answer, prompt, sampler, found) in list(in_flight.items()):
            expected = plain_answer(TABLE, prompt, len(found), sampler)
            assert found == expected
            if answer.has_ended or chance.random() < 0.03:  # or its client has left
                done.append(number)
                free.append(answer.kv)
                del in_flight[number]
    assert sorted(done) == list(range(14))


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_pass_that_fails_behind_its_first_layer_is_run_again(ahead):
    """Draft steps of its shadow are in flight then."""
    plan = policy(5, 3, 20, costs=plan_costs(0.01, 0.9), shadow_rows=60)
    engine, target = engine_of(plan, ahead=ahead)
    kvs = caches(3)
    answers = [engine.join(request_for(prompt, 30), kv) for prompt, kv in zip(PROMPTS[:3], kvs, strict=True)]
    layers, rounds, tokens = target.layers, 0, {id(answer): [] for answer in answers}

    def failing(flow):
        for layer in layers(flow):
            yield layer
            if rounds % 3 == 2:
                raise OSError("the disk is gone")

    target.layers = failing
    while in_flight := [answer for answer in answers if not answer.has_ended]:
        rounds += 1
        try:
            for answer, output in engine.round(in_flight):
                tokens[id(answer)].extend(output.token_ids)
        except OSError:
            assert rounds % 3 == 2
    assert list(tokens.values()) == [plain_answer(TABLE, prompt, 30) for prompt in PROMPTS[:3]]


def test_all_trees_of_a_round_share_one_pass():
    engine, target = engine_of(PLANS["trees"])
    requests = [request_for(prompt, 20) for prompt in PROMPTS[:4]]
    begun, begin = [], target.begin
    target.begin = lambda batches: begun.append([len(batch) for batch in batches]) or begin(batches)
    _, answers = answer_all(engine, requests, caches(4))
    passes = [answer.output.stats.passes for answer in answers]
    assert begun[0] == [1, 1, 1, 1], "each prompt is a batch of its own"
    assert begun[1] == [4], "and all trees are one"
    assert len(begun) == 1 + max(passes)


def test_a_pass_in_company_takes_one_chunk_of_a_prompt_and_nobody_waits_for_the_rest():
    engine, _ = engine_of(PLANS["trees"])
    long = tuple(n % VOCAB for n in range(3 * PREFILL_CHUNK + 5))
    short, other = caches(1)[0], caches(1, 4 * PREFILL_CHUNK)[0]
    first = engine.join(request_for((1, 2, 3), 90), short)
    tokens = [token for _, output in engine.round([first]) for token in output.token_ids]
    second = engine.join(request_for(long, 4), other)
    rounds, late = 0, []
    while not second.has_ended:
        rounds += second.is_reading
        for answer, output in engine.round([first, second]):
            (tokens if answer is first else late).extend(output.token_ids)
    assert rounds == 4, "a chunk at a time"
    assert len(tokens) >= 5, "the first one got tokens in each of these passes"
    assert tokens == plain_answer(TABLE, (1, 2, 3), len(tokens))
    assert late == plain_answer(TABLE, long, 4)


@pytest.mark.parametrize(("company_rows", "passes"), [(0, 4), (PREFILL_CHUNK, 4), (2 * PREFILL_CHUNK, 2)])
def test_a_pass_in_company_takes_as_many_prompt_rows_as_it_may(company_rows, passes):
    engine, _ = engine_of(company_rows=company_rows)
    prompts = [tuple(n % VOCAB for n in range(2 * PREFILL_CHUNK))] * 2
    first = engine.join(request_for((1, 2), 60), caches(1)[0])
    list(engine.round([first]))
    readers = [
        engine.join(request_for(prompt, 3), kv)
        for prompt, kv in zip(prompts, caches(2, 3 * PREFILL_CHUNK), strict=True)
    ]
    rounds = 0
    while any(reader.is_reading for reader in readers):
        list(engine.round([first, *readers]))
        rounds += 1
    assert rounds == passes


def test_alone_a_prompt_is_one_pass_and_so_are_several_that_begin_together():
    engine, _ = engine_of()
    prompts = [tuple(n % VOCAB for n in range(size)) for size in (700, 300)]
    answers = [
        engine.join(request_for(prompt, 2), kv) for prompt, kv in zip(prompts, caches(2, 1024), strict=True)
    ]
    assert len(list(engine.round(answers))) == 2
    assert [answer.output.stats.prefill_passes for answer in answers] == [1, 1]


@pytest.mark.parametrize("nodes", [9, 24])
def test_nodes_of_a_pass_are_bounded_together(nodes):
    plan = policy(20, 8, nodes, costs=plan_costs(0.001, 0.5))
    engine, target = engine_of(plan, draft=TABLE)
    begun, begin = [], target.begin
    target.begin = lambda batches: begun.append(batches) or begin(batches)
    tokens, _ = answer_all(engine, [request_for(prompt, 40) for prompt in PROMPTS[:3]], caches(3))
    assert tokens == [plain_answer(TABLE, prompt, 40) for prompt in PROMPTS[:3]]
    sizes = [sum(rows.group.rows for rows in batches[0]) for batches in begun[1:]]
    assert 3 < max(sizes) <= nodes


def test_candidates_share_a_step_by_their_chances_and_keep_their_order_in_each_tree():
    frontiers = [SimpleNamespace(worth=lambda row: row) for _ in range(3)]
    offers = [[0.9, 0.5, 0.6, 0.1], [], [0.8, 0.7, 0.05]]
    choices = merged(zip(frontiers, offers, strict=True))
    assert [(choice.number, choice.candidate) for choice in choices] == [
        (0, 0.9),
        (2, 0.8),
        (2, 0.7),
        (0, 0.5),
        (0, 0.6),
        (0, 0.1),
        (2, 0.05),
    ]


def test_an_answer_takes_the_rows_of_its_prompt_that_its_cache_has():
    engine, _ = engine_of(PLANS["trees"])
    kv = caches(1)[0]
    answer_all(engine, [request_for((1, 2, 3), 5)], [kv])
    known = kv.token_ids
    answer = engine.join(request_for((*known, 4, 5), 3), kv)
    assert answer.reused == len(known)


def test_a_prompt_that_leaves_no_room_is_refused_when_it_joins():
    engine, _ = engine_of()
    with pytest.raises(UsageError, match="the prompt has 16 tokens, the context holds 16"):
        engine.join(request_for([1] * 16, 2), fake_cache(16))


def test_a_scripted_tree_of_each_answer_is_verified_by_its_own_path():
    answers = {prompt: plain_answer(TABLE, prompt, 9) for prompt in PROMPTS[:2]}
    engine, _ = engine_of(PLANS["chains"], draft=TABLE)
    requests = [request_for(prompt, 9) for prompt in answers]
    tokens, joined = answer_all(engine, requests, caches(2))
    assert tokens == list(answers.values())
    assert all(answer.output.stats.passes == 2 for answer in joined), "drafts are right, so 7 tokens a pass"
    assert chain_of([1]).depth == 0


def test_each_answer_is_judged_by_its_own_record():
    """Beside an answer whose draft is always wrong, one whose draft is always right keeps deep trees."""
    wrong = random_table(99)
    drafts = chosen_by_first_token({1: TABLE, 9: wrong})
    requests = [(1, 2, 3), (9, 8, 7)]

    def mean_accepted(prompts):
        engine, _ = engine_of(policy(20, 8, 24, costs=plan_costs(0.05, 1.0)), draft=drafts)
        answers = [
            engine.join(request_for(prompt, 80), kv)
            for prompt, kv in zip(prompts, caches(len(prompts)), strict=True)
        ]
        while in_flight := [answer for answer in answers if not answer.has_ended]:
            list(engine.round(in_flight))
        return [answer.output.stats.tau for answer in answers]

    (alone,) = mean_accepted(requests[:1])
    right, of_wrong = mean_accepted(requests)
    assert of_wrong < 2
    assert right > 0.6 * alone, "0.57 where both are judged together"


def chosen_by_first_token(tables):
    return lambda prefix: tables[prefix[0]](prefix)
