"""End to end on tiny models: whatever the draft does, the tokens are those of plain decoding."""

import math

import pytest
import torch
from fakes_session import Answer, answer_to, audit_of, open_tiny
from tiny_models import FAMILIES, Tiny

from subspec_cli.modeling.exact_attention import ChainRows, ExactAttention
from subspec_cli.modeling.fast_attention import fast_attention, grouped_mask
from subspec_cli.modeling.row_rules import RowRules
from subspec_cli.modeling.substitute import resident_layer
from subspec_cli.session import load

SAMPLINGS = {
    "greedy": {},
    "cool": {"temperature": 0.7, "top_p": 0.95, "top_k": 20, "seed": 5},
    "warm": {"temperature": 1.0, "top_p": 0.95, "seed": 6},
}
WINDOW = 24
EXTRA = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {},
}
PROMPTS = ["Rivers", "Why is the sky blue, and the sea, and what else is blue?", "ü\n"]
LONG_PROMPT = "All work and no play makes a dull day. " * 8  # 312 tokens: more than one prefill chunk


def model_of(shelf, family, *, dtype=torch.bfloat16, tied=False, **how):
    return shelf.model(family, dtype=dtype, tied=tied, **(EXTRA[family] | how))


def conversation(session, turns=("Hello", "And then?", "Why?")):
    """Outcomes of a chat of several turns over one cache."""
    session.reset()
    chat = session.chat("Be brief.")
    answers = [Answer(chat.ask(turn, max_new_tokens=12, stop=())) for turn in turns]
    assert answers[-1].stats.prefilled_tokens < answers[-1].stats.prompt_tokens
    return [answer.outcome for answer in answers]


def check_speculates(session, answers):
    """The comparison is worth something: layers were streamed, and tokens drafted and taken."""
    about = session.description
    assert (about.exactness, about.speculation) == ("exact", True)
    assert about.plan.streamed
    assert sum(answer.stats.drafted_tokens for answer in answers) > 0
    assert sum(answer.stats.streamed_bytes for answer in answers) > 0
    assert sum(answer.stats.passes for answer in answers) < sum(
        len(answer.token_ids) - 1 for answer in answers
    )


@pytest.mark.parametrize(
    ("family", "dtype", "tied"),
    [
        *(
            pytest.param(family, torch.bfloat16, False, marks=() if family == "qwen3" else pytest.mark.slow)
            for family in FAMILIES
        ),
        ("llama", torch.bfloat16, True),
        ("qwen2", torch.float16, False),
        ("mistral", torch.float32, False),
    ],
)
def test_speculative_tokens_are_the_plain_ones(shelf, family, dtype, tied):
    """Against a session of its own without substitutes, where every layer is resident."""
    model = model_of(shelf, family, dtype=dtype, tied=tied)
    for resident, sampling in enumerate(("greedy", "cool")):
        flags = {"sampling": SAMPLINGS[sampling]}
        with open_tiny(model, **flags, memory={"resident_layers": resident}) as session:
            speculative = [answer_to(session, prompt, 16, request_number=7) for prompt in PROMPTS]
            check_speculates(session, speculative)
            spoken = conversation(session)
        with open_tiny(
            model, **flags, draft={"no_speculation": True}, memory={"resident_layers": None}
        ) as session:
            assert not session.description.speculation
            for prompt, answer in zip(PROMPTS, speculative, strict=True):
                assert answer.outcome == answer_to(session, prompt, 16, request_number=7).outcome
            assert conversation(session) == spoken


@pytest.mark.parametrize(
    ("family", "sampling"),
    [
        *(("llama", sampling) for sampling in SAMPLINGS),
        ("mistral", "warm"),
        ("qwen2", "warm"),
        pytest.param("qwen3", "warm", marks=pytest.mark.slow),
    ],
)
def test_both_arms_of_one_session_agree_on_long_texts(shelf, family, sampling):
    """As `bench` compares them, over a prompt of two prefill chunks and far past the window."""
    model = model_of(shelf, family)
    with open_tiny(model, sampling=SAMPLINGS[sampling]) as session:
        arms = [answer_to(session, LONG_PROMPT, 90, plain=plain, request_number=1) for plain in (False, True)]
    assert arms[0].outcome == arms[1].outcome
    assert len(arms[0].token_ids) > 60 or arms[0].finish_reason == "stop"
    assert arms[1].stats.drafted_tokens == 0
    assert arms[1].stats.tau == 1


@pytest.mark.parametrize(
    ("family", "window"),
    [
        ("mistral", 70),
        ("qwen2", 1),
        pytest.param("mistral", 1, marks=pytest.mark.slow),
        pytest.param("qwen2", 70, marks=pytest.mark.slow),
    ],
)
def test_windows_shorter_than_prompt_and_tree_change_no_token(shelf, family, window):
    """And the greedy tokens are the library's within rounding."""
    model = model_of(shelf, family, sliding_window=window)
    for sampling in ("greedy", "warm"):
        with open_tiny(model, sampling=SAMPLINGS[sampling], draft={"depth": 9}) as session:
            arms = [
                answer_to(session, LONG_PROMPT, 60, plain=plain, request_number=5) for plain in (False, True)
            ]
            if sampling == "greedy":
                assert audit_of(session, LONG_PROMPT, arms[0]).problems == ()
        assert arms[0].outcome == arms[1].outcome
        assert arms[0].stats.drafted_tokens > 0


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "qwen3",
        pytest.param("mistral", marks=pytest.mark.slow),
        pytest.param("qwen2", marks=pytest.mark.slow),
    ],
)
def test_answers_across_the_first_large_block_change_no_token(shelf, family):
    """Prompt and trees reach from small blocks alone into the positions that have a large one."""
    window = {} if family == "llama" else {"sliding_window": 600}
    model = model_of(shelf, family, max_position_embeddings=1024, **window)
    prompt = "All work and no play makes a dull day. " * 13  # 507 tokens
    how = {"sampling": SAMPLINGS["warm"], "memory": {"context": 800}}
    with open_tiny(model, **how) as session:
        arms = [answer_to(session, prompt, 160, plain=plain, request_number=6) for plain in (False, True)]
    assert arms[0].outcome == arms[1].outcome
    assert len(arms[0].token_ids) > 100 or arms[0].finish_reason == "stop"


@pytest.mark.parametrize(
    "shape", [{"depth": 1}, {"depth": 9, "width": 1}, {"depth": 5, "width": 4}, {"width": 8}]
)
def test_the_shape_of_the_tree_changes_no_token(shelf, shape):
    model = model_of(shelf, "llama")
    for sampling in ("greedy", "warm"):
        with open_tiny(model, sampling=SAMPLINGS[sampling], draft=shape) as session:
            speculative, plain = (
                answer_to(session, PROMPTS[1], 60, plain=p, request_number=2) for p in (False, True)
            )
        assert speculative.outcome == plain.outcome
        check_speculates(session, [speculative])


@pytest.mark.parametrize("bits", [2, 8])
def test_the_bits_of_the_substitutes_change_no_token(shelf, bits):
    outcomes = []
    for width in (4, bits):
        model = model_of(shelf, "qwen3", bits=width)
        with open_tiny(model, sampling=SAMPLINGS["warm"]) as session:
            outcomes.append([answer_to(session, prompt, request_number=3).outcome for prompt in PROMPTS])
    assert outcomes[0] == outcomes[1]


def test_where_the_layers_live_changes_no_token(shelf):
    model, outcomes = model_of(shelf, "qwen2", sharded=True), []
    for resident in range(4):
        with open_tiny(model, sampling=SAMPLINGS["warm"], memory={"resident_layers": resident}) as session:
            assert session.description.plan.resident_layers == resident
            outcomes.append([answer_to(session, prompt, 40, request_number=4).outcome for prompt in PROMPTS])
    assert outcomes == [outcomes[0]] * 4


def test_layers_wide_enough_to_need_padding_change_no_token(shelf):
    """Here a lone row of the last projection rounds otherwise than one among others (AVX512, bf16)."""
    model = model_of(shelf, "llama", hidden=256, intermediate_size=2816, layers=2)
    for sampling in SAMPLINGS.values():
        with open_tiny(model, sampling=sampling) as session:
            speculative, plain = (
                answer_to(session, PROMPTS[1], 16, plain=p, request_number=2) for p in (False, True)
            )
            check_speculates(session, [speculative])
        assert speculative.outcome == plain.outcome


def test_a_cache_that_is_reused_changes_no_token(shelf):
    """Rows made by decoding, by prefill and by an abandoned turn serve the next prompt alike."""
    model = model_of(shelf, "mistral")
    with open_tiny(model) as session:
        fresh = answer_to(session, PROMPTS[1] + " So?", request_number=0)
        for taken in (1, 3):
            session.reset()
            ids = session.encode_prompt(PROMPTS[1], system=None, raw=False)
            steps = session.generate(ids, max_new_tokens=50, stop=())
            for _ in range(taken):
                next(steps)
            steps.close()
            again = answer_to(session, PROMPTS[1] + " So?", request_number=0, keep_cache=True)
            assert again.stats.prefilled_tokens < fresh.stats.prefilled_tokens
            assert again.outcome == fresh.outcome


# --- drafts that are known ---------------------------------------------------------------------------------------


def draft_of(matrices_of, monkeypatch):
    """Put plain layers of given matrices in the place of the substitutes."""

    def plain(math, layer, stored, bits, device):
        return resident_layer(math, layer, matrices_of(layer))

    monkeypatch.setattr(load, "load_substitute", plain)


def own_matrices(tiny, layer):
    prefix = f"model.layers.{layer}."
    return {
        name.removeprefix(prefix): tensor for name, tensor in tiny.weights.items() if name.startswith(prefix)
    }


def noise_matrices(tiny, layer):
    generator = torch.Generator().manual_seed(layer)
    return {
        name: torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        for name, tensor in own_matrices(tiny, layer).items()
    }


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_draft_of_noise_changes_no_token_and_gains_nothing(shelf, sampling, monkeypatch):
    model = model_of(shelf, "qwen3")
    draft_of(lambda layer: noise_matrices(Tiny(model), layer), monkeypatch)
    with open_tiny(model, sampling=SAMPLINGS[sampling], draft={"depth": 3}) as session:
        speculative, plain = (
            answer_to(session, PROMPTS[1], 60, plain=p, request_number=2) for p in (False, True)
        )
    assert speculative.outcome == plain.outcome
    assert speculative.stats.drafted_tokens > 100
    assert speculative.stats.tau < 1.5


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_draft_that_is_the_target_is_accepted_whole(shelf, sampling, monkeypatch):
    """F88. In float32 the draft's faster attention is too close to the target's to change a choice."""
    model = model_of(shelf, "llama", dtype=torch.float32)
    draft_of(lambda layer: own_matrices(Tiny(model), layer), monkeypatch)
    with open_tiny(model, sampling=SAMPLINGS[sampling], draft={"depth": 4, "width": 1}) as session:
        speculative, plain = (
            answer_to(session, PROMPTS[1], 51, plain=p, request_number=2) for p in (False, True)
        )
    assert speculative.outcome == plain.outcome
    after_first = len(speculative.token_ids) - 1
    assert after_first > 20
    assert speculative.stats.passes == math.ceil(after_first / 5)
    assert speculative.stats.accepted_histogram[-1] >= speculative.stats.passes - 1
    assert after_first % 5 or speculative.stats.tau == 5


def test_windows_go_by_position_not_by_slot(shelf, monkeypatch):
    """Trap 11, seen only where the accepted path is deeper than the window and has other nodes between its own."""
    model = shelf.model("mistral", sliding_window=3)
    draft_of(lambda layer: own_matrices(Tiny(model), layer), monkeypatch)
    with open_tiny(model, sampling=SAMPLINGS["warm"], draft={"depth": 12, "width": 4}) as session:
        for prompt in PROMPTS:
            speculative, plain = (
                answer_to(session, prompt, 60, plain=p, request_number=2) for p in (False, True)
            )
            assert speculative.outcome == plain.outcome
            assert speculative.stats.tau > 5
            assert speculative.stats.drafted_tokens > 20 * speculative.stats.passes


def test_a_damaged_draft_changes_no_token(shelf, monkeypatch):
    """F84: substitutes that give NaN propose nothing; decoding goes on plainly."""
    model = model_of(shelf, "qwen2")

    def damaged(layer):
        return {name: torch.full_like(t, torch.nan) for name, t in own_matrices(Tiny(model), layer).items()}

    draft_of(damaged, monkeypatch)
    for sampling in SAMPLINGS.values():
        with open_tiny(model, sampling=sampling) as session:
            speculative, plain = (
                answer_to(session, PROMPTS[1], plain=p, request_number=2) for p in (False, True)
            )
        assert speculative.outcome == plain.outcome
        assert speculative.stats.drafted_tokens == 0


# --- the comparison itself ---------------------------------------------------------------------------------------


def test_ordinary_kernels_do_not_pass_and_are_not_called_exact(shelf, monkeypatch):
    """The inverse: with the draft's attention and unpadded rows in the target, tokens differ and it is said."""

    def masked(self, positions, path, committed):
        return torch.nn.functional.pad(path, (committed, 0), value=True)

    def ordinary(self, query, keys, values, rows, shape):
        """One call over all rows in view, as other programs run it."""
        if isinstance(rows, ChainRows):
            end = rows.first + len(query)
            rows = torch.arange(end)[None] <= torch.arange(rows.first, end)[:, None]
        mask, end = grouped_mask(rows, shape.group, query), rows.shape[1]
        return fast_attention(
            query, keys[None, :, :end], values[None, :, :end], mask, scale=shape.head_dim**-0.5
        )

    monkeypatch.setattr(ExactAttention, "tree_rows", masked)
    monkeypatch.setattr(ExactAttention, "attend", ordinary)
    monkeypatch.setattr(RowRules, "padded", lambda self, rows: rows)
    disagreements = 0
    with open_tiny(model_of(shelf, "llama"), sampling={"temperature": 1.0, "seed": 1}) as session:
        assert session.description.exactness == "numeric"
        for prompt in (*PROMPTS, LONG_PROMPT):
            arms = [answer_to(session, prompt, 90, plain=plain, request_number=1) for plain in (False, True)]
            disagreements += arms[0].token_ids != arms[1].token_ids
    if not disagreements:
        pytest.skip("with this instruction set ordinary kernels round these rows alike")
