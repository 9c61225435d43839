"""Repositories changed at random: each answers as the library does, or is refused in one line.

    python tests/repository_fuzz.py [--count 2000] [--seed 0] [--family NAME] [--verbose]

One process. A case is made from its number alone, so that any one can be run again.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from library_answers import Outcome, first_gap, library_answer, our_answer
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_model, write_tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import CONFIG_MAPPING

from subspec_cli.checkpoint.families import FAMILIES
from subspec_cli.errors import ExitCode, SubspecError

TEXT = "the sea and a light"
LIMIT = 6
MOST_SECONDS = 30
WORDS = [
    "the",
    "sea",
    "and",
    "a",
    "light",
    "house",
    "of",
    "stone",
    "on",
    "rock",
    "over",
    "water",
    "with",
    "wind",
]
NEAR_TIE = 1e-3
_KINDS = ["sliding_attention", "full_attention"]
SETTINGS: dict[str, dict[str, Any]] = {
    "cohere2": {"sliding_window": 5, "layer_types": _KINDS},
    "exaone4": {"sliding_window": 5, "layer_types": _KINDS},
    "gemma2": {"head_dim": 16, "sliding_window": 5},
    "gemma3_text": {"head_dim": 16, "sliding_window": 5, "layer_types": _KINDS},
    "gemma4_text": {
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": 5,
        "layer_types": _KINDS,
        "hidden_size_per_layer_input": 0,
    },
    "gemma4_unified_text": {
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": 5,
        "layer_types": _KINDS,
    },
    "glm4": {"head_dim": 16, "pad_token_id": 0},
    "granite": {"residual_multiplier": 0.3, "logits_scaling": 2.0},
    "hunyuan_v1_dense": {"head_dim": 16},
    "ministral": {"head_dim": 16, "sliding_window": 5, "layer_types": _KINDS},
    "ministral3": {"head_dim": 16},
    "olmo3": {"sliding_window": 5, "layer_types": _KINDS},
    "phi3": {"pad_token_id": 0},
    "qwen3_5_text": {
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "seed_oss": {"head_dim": 16},
    "smollm3": {"pad_token_id": 0, "no_rope_layers": [1, 0]},
    "stablelm": {"use_qkv_bias": True, "partial_rotary_factor": 0.5},
}
"""What a small model of a family sets, if it sets anything."""
Case = Callable[[Path, random.Random], str]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a case."""

    kind: str
    """`same`, `refused`, or a fault: `differs`, `alone` (the library refuses), `crash`, `hang`."""
    what: str
    """The change, and what was said."""


def pieces(alphabet: str) -> dict[str, int]:
    """A vocabulary of bytes and letters for the kinds that fall back to bytes."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *alphabet]
    return {text: number for number, text in enumerate(dict.fromkeys(texts))}


def write_byte_level(directory: Path) -> None:
    write_tiny_tokenizer(directory)


def write_byte_fallback(directory: Path) -> None:
    """Llama 2 as a tokenizer.json: a prefix space, bytes for what is unknown, a strip at the end."""
    vocabulary = pieces("\u2581theasndlig")
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _save(directory, tokenizer, "</s>")


def write_unigram(directory: Path) -> None:
    letters = sorted(set("".join(WORDS)))
    scored = [
        ("<unk>", 0.0),
        ("</s>", 0.0),
        ("\u2581", -2.0),
        *((w, -5.0) for w in WORDS),
        *((c, -9.0) for c in letters),
    ]
    tokenizer = Tokenizer(models.Unigram(list(dict(scored).items()), unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    _save(directory, tokenizer, "</s>")


def write_word_piece(directory: Path) -> None:
    letters = sorted(set("".join(WORDS)))
    texts = dict.fromkeys(["[UNK]", "[SEP]", *WORDS, *letters, *(f"##{c}" for c in letters), ".", ","])
    tokenizer = Tokenizer(models.WordPiece({t: n for n, t in enumerate(texts)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    _save(directory, tokenizer, "[SEP]")


def write_word_level(directory: Path) -> None:
    tokenizer = Tokenizer(
        models.WordLevel({t: n for n, t in enumerate(["[UNK]", "[END]", *WORDS])}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    _save(directory, tokenizer, "[END]")


def write_sentencepiece(directory: Path) -> None:
    """A tokenizer.model alone, as in repositories of Llama 2's age."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS), TEXT, "a light on the sea"] * 30),
        model_writer=model,
        vocab_size=60,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (directory / "tokenizer.json").unlink(missing_ok=True)
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "eos_token": "</s>",
        "bos_token": "<s>",
        "unk_token": "<unk>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def _save(directory: Path, tokenizer: Tokenizer, end: str) -> None:
    tokenizer.add_special_tokens([end])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


TOKENIZERS = (
    write_byte_level,
    write_byte_fallback,
    write_unigram,
    write_word_piece,
    write_word_level,
    write_sentencepiece,
)
FOREIGN = {
    "attn_logit_softcapping": [50.0, None, 0],
    "attention_chunk_size": [8, None],
    "attention_bias": [True, False],
    "mlp_bias": [True],
    "clip_qkv": [8.0],
    "head_dim": [8, 16, None, 12],
    "layer_types": [
        ["full_attention"] * 2,
        ["sliding_attention"] * 2,
        ["full_attention", "sliding_attention"],
        None,
    ],
    "logit_scale": [0.5],
    "max_window_layers": [0, 1, 28],
    "num_experts": [4, 0],
    "num_nextn_predict_layers": [1],
    "original_max_position_embeddings": [16, 64, None],
    "partial_rotary_factor": [0.5, 1.0, None],
    "pretraining_tp": [2],
    "quantization_config": [{}, {"quant_method": "gptq", "bits": 4}, None],
    "rope_theta": [100.0, 1e6, None, "1e4"],
    "sliding_window": [3, 4096, None, 0, [3]],
    "temperature": [0.5],
    "text_config": [{"hidden_size": 8}],
    "tokenizer_class": ["LlamaTokenizer", "NoSuchTokenizer", 3],
    "torch_dtype": ["float16", "bogus"],
    "use_sliding_window": [True, False, None],
}
ROPES: list[Any] = [
    {"type": "linear", "factor": 2.0},
    {"rope_type": "linear", "factor": 4},
    {"type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {"type": "yarn", "factor": 2.0, "beta_fast": 16, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [3.0] * 8,
        "original_max_position_embeddings": 20,
    },
    {"type": "longrope", "short_factor": [1.5] * 8, "long_factor": [3.0] * 8, "factor": 4.0},
    {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [2, 3, 3]},
    {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    {"type": "su"},
    {"rope_type": None, "rope_theta": 1e4},
    {},
    2.0,
    [],
]
ENDS: list[Any] = [None, 3, [3, 5], "3", 3.0, True, [], [3, None], -1, 100_000, list(range(60))]


def change_json(path: Path, change: Callable[[dict[str, Any]], str]) -> str:
    """Read, change and write a JSON object; return what `change` says."""
    content = json.loads(path.read_text()) if path.exists() else {}
    said = change(content)
    path.write_text(json.dumps(content))
    return f"{path.name}: {said}"


def drop_field(directory: Path, chance: random.Random) -> str:
    def change(content: dict[str, Any]) -> str:
        name = chance.choice(sorted(content))
        del content[name]
        return f"{name} dropped"

    return change_json(directory / "config.json", change)


def retype_field(directory: Path, chance: random.Random) -> str:
    def change(content: dict[str, Any]) -> str:
        name = chance.choice(sorted(content))
        old = content[name]
        number = old if isinstance(old, int | float) and not isinstance(old, bool) else 1
        content[name] = chance.choice(
            [None, str(old), float(number), bool(old), [old], {"a": old}, -number, 0, number * 2]
        )
        return f"{name} {old!r} to {content[name]!r}"

    return change_json(directory / "config.json", change)


def add_field(directory: Path, chance: random.Random) -> str:
    def change(content: dict[str, Any]) -> str:
        name = chance.choice(sorted(FOREIGN))
        content[name] = chance.choice(FOREIGN[name])
        return f"{name} = {content[name]!r}"

    return change_json(directory / "config.json", change)


def swap_family(directory: Path, chance: random.Random) -> str:
    def change(content: dict[str, Any]) -> str:
        other = json.loads(CONFIG_MAPPING[chance.choice(sorted(FAMILIES))]().to_json_string(use_diff=False))
        other["architectures"] = [chance.choice(["LlamaForCausalLM", "MistralForCausalLM", "Qwen2Model"])]
        kept = {"hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "head_dim"}
        names = chance.sample(sorted(other.keys() - kept), chance.randint(1, 3))
        for name in names:
            content[name] = other[name]
        return f"of another family: {', '.join(names)}"

    return change_json(directory / "config.json", change)


def change_rope(directory: Path, chance: random.Random) -> str:
    def change(content: dict[str, Any]) -> str:
        table = chance.choice(ROPES)
        if isinstance(table, dict) and table and chance.random() < 0.3:
            name = chance.choice(sorted(table))
            table = table | {name: chance.choice([None, "2", -1, [1.0], 0])}
        where = chance.choice(["rope_scaling", "rope_parameters"])
        content[where] = table
        if where == "rope_scaling" and chance.random() < 0.5:
            content.pop("rope_parameters", None)
        return f"{where} = {table!r}"

    return change_json(directory / "config.json", change)


def change_ends(directory: Path, chance: random.Random) -> str:
    name = chance.choice(["config.json", "generation_config.json"])
    if name == "generation_config.json" and chance.random() < 0.2:
        (directory / name).unlink(missing_ok=True)
        return f"{name} gone"

    def change(content: dict[str, Any]) -> str:
        if chance.random() < 0.15:
            content.pop("eos_token_id", None)
            return "no eos_token_id"
        content["eos_token_id"] = chance.choice(ENDS)
        return f"eos_token_id = {content['eos_token_id']!r}"

    return change_json(directory / name, change)


def change_ties(directory: Path, chance: random.Random) -> str:
    def change(content: dict[str, Any]) -> str:
        content["tie_word_embeddings"] = chance.choice([True, False, None, 1])
        return f"tie_word_embeddings = {content['tie_word_embeddings']!r}"

    return change_json(directory / "config.json", change)


def change_tensors(directory: Path, chance: random.Random) -> str:  # noqa: C901 - an arm a change
    path = directory / "model.safetensors"
    held = load_file(path)
    name = chance.choice(sorted(held))
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    match chance.choice(
        ["drop", "prefix", "type", "all types", "add", "buffer", "shape", "head", "half", "small"]
    ):
        case "drop":
            del held[name]
            said = f"{name} dropped"
        case "prefix":
            prefix = chance.choice(["_orig_mod.", "module.", "model."])
            held = {prefix + key: tensor for key, tensor in held.items()}
            said = f"names behind {prefix}"
        case "type":
            dtype = chance.choice(
                [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int8]
            )
            held[name] = held[name].to(dtype)
            said = f"{name} as {dtype}"
        case "all types":
            dtype = chance.choice([torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
            held = {key: tensor.to(dtype) for key, tensor in held.items()}
            said = f"all as {dtype}"
        case "add":
            extra = chance.choice(
                ["model.layers.0.self_attn.q_proj.bias", "model.layers.7.mlp.up_proj.weight", "score.weight"]
            )
            held[extra] = torch.zeros(4)
            said = f"{extra} added"
        case "buffer":
            extra = chance.choice(
                ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
            )
            held[extra] = torch.ones(8)
            said = f"{extra} added"
        case "shape":
            held[name] = held[name][..., :-1].contiguous()
            said = f"{name} cut"
        case "head" if embedding in held:
            held[head] = (
                held[embedding].clone() if chance.random() < 0.5 else torch.randn_like(held[embedding])
            )
            said = "a head of its own"
        case "half":
            if embedding in held:
                held[head] = held.pop(embedding)
            said = "the embedding under the head's name"
        case _:
            dtype = chance.choice([torch.float16, torch.bfloat16, torch.float64])
            held = {key: tensor.to(dtype) if tensor.ndim == 1 else tensor for key, tensor in held.items()}
            said = f"norms and biases as {dtype}"
    save_file(held, path, metadata={"format": "pt"})
    return f"tensors: {said}"


def change_tokenizer(directory: Path, chance: random.Random) -> str:  # noqa: C901 - an arm a change
    path = directory / "tokenizer.json"
    match chance.choice(["gone", "junk", "cut", "id", "settings", "class", "added", "special"]):
        case "gone":
            path.unlink(missing_ok=True)
            return "tokenizer.json gone"
        case "junk":
            name = chance.choice(
                ["tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"]
            )
            (directory / name).write_text(chance.choice(["", "[]", "{}", "null", '{"a": 1}', "\x00"]))
            return f"junk in {name}"
        case "cut" if path.exists():
            path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])
            return "tokenizer.json cut short"
        case "id" if path.exists():

            def move(content: dict[str, Any]) -> str:
                vocabulary = content["model"]["vocab"]
                if not isinstance(vocabulary, dict):
                    return "nothing"
                token = chance.choice(sorted(vocabulary))
                vocabulary[token] = chance.choice([287, 288, 300, 5000, vocabulary[token]])
                return f"{token!r} at {vocabulary[token]}"

            return change_json(path, move)
        case "added":
            (directory / "added_tokens.json").write_text(
                json.dumps({"<new>": chance.choice([280, 287, 288, 400])})
            )
            return "added_tokens.json"
        case "special":
            token = chance.choice(["<pad>", "the", "[UNK]", None, 3, {"content": "<pad>"}])
            return change_json(
                directory / "tokenizer_config.json",
                lambda c: c.update(pad_token=token) or f"pad_token {token!r}",
            )
        case "class":
            name = chance.choice(["LlamaTokenizer", "Qwen2Tokenizer", "GPT2TokenizerFast", "NoSuch", None, 3])
            return change_json(
                directory / "tokenizer_config.json",
                lambda c: c.update(tokenizer_class=name) or f"class {name!r}",
            )

    def settings(content: dict[str, Any]) -> str:
        name = chance.choice(
            [
                "add_bos_token",
                "add_eos_token",
                "eos_token",
                "model_max_length",
                "clean_up_tokenization_spaces",
            ]
        )
        content[name] = chance.choice([True, False, None, 3, "x"])
        return f"{name} = {content[name]!r}"

    return change_json(directory / "tokenizer_config.json", settings)


CHANGES: tuple[tuple[Case, int], ...] = (
    (drop_field, 3),
    (retype_field, 5),
    (add_field, 4),
    (swap_family, 3),
    (change_rope, 4),
    (change_ends, 2),
    (change_ties, 1),
    (change_tensors, 4),
    (change_tokenizer, 4),
)


class Shelf:
    """Models of each family, made once; a case changes a copy."""

    def __init__(self, root: Path, families: Iterable[str]) -> None:
        self._root = root
        self.families = sorted(families)

    def model(self, family: str, *, tied: bool) -> Path:
        """Directory of the unchanged model."""
        directory = self._root / f"{family}-{tied}"
        if not directory.exists():
            small: dict[str, Any] = {"layers": 2, "hidden": 64, "dtype": torch.float32, "tied": tied}
            make_tiny_model(
                directory, family, **{"max_position_embeddings": 128} | small | SETTINGS.get(family, {})
            )
        return directory


def run_case(number: int, shelf: Shelf, directory: Path) -> Verdict:
    """Make a case, and judge it."""
    chance = random.Random(number)
    source = shelf.model(chance.choice(shelf.families), tied=chance.random() < 0.5)
    shutil.copytree(source, directory)
    if number % 3 == 0:
        chance.choice(TOKENIZERS)(directory)
    cases, weights = zip(*CHANGES, strict=True)
    chosen = chance.choices(cases, weights, k=chance.choice([1, 1, 2]))
    said = f"#{number} {source.name}: " + "; ".join(case(directory, chance) for case in chosen)
    try:
        with time_limit(MOST_SECONDS):
            return judge(directory, said)
    except TimeoutError:
        return Verdict("hang", said)


def judge(directory: Path, said: str) -> Verdict:
    """Compare our answer with the library's."""
    try:
        ours, repository = our_answer(directory, TEXT, LIMIT)
    except SubspecError as error:
        known = error.exit_code in (ExitCode.UNSUPPORTED, ExitCode.INTEGRITY, ExitCode.USAGE)
        return Verdict(
            "refused" if known and "\n" not in error.message else "crash", f"{said}: {error.message}"
        )
    except Exception as error:
        return Verdict("crash", f"{said}: {type(error).__name__}: {error}"[:300])
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[repository.geometry.dtype]
    try:
        theirs, model = library_answer(directory, TEXT, LIMIT, dtype)
    except Exception as error:
        return Verdict("alone", f"{said}: {type(error).__name__}: {error}"[:300].replace("\n", " "))
    if ours == theirs or near_tie(model, ours, theirs, dtype):
        return Verdict("same", said)
    return Verdict("differs", f"{said}: {ours} instead of {theirs}")


def near_tie(model: Any, ours: Outcome, theirs: Outcome, dtype: torch.dtype) -> bool:
    """Whether the first token that differs was nearly as likely, by the rounding of the type."""
    if ours.prompt_ids != theirs.prompt_ids or ours.token_ids == theirs.token_ids:
        return False
    gap = first_gap(model, ours.prompt_ids, ours.token_ids, theirs.token_ids)
    return gap <= {torch.float32: NEAR_TIE, torch.float16: 0.05, torch.bfloat16: 0.4}[dtype]


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError after some seconds."""

    def expire(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_all(
    numbers: range, root: Path, on_verdict: Callable[[Verdict], None], families: Iterable[str] = FAMILIES
) -> Counter[str]:
    """Judge cases; return how many there are of each kind."""
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    counts: Counter[str] = Counter()
    shelf = Shelf(root, families)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in numbers:
            directory = root / "case"
            verdict = run_case(number, shelf, directory)
            shutil.rmtree(directory, ignore_errors=True)
            counts[verdict.kind] += 1
            on_verdict(verdict)
    return counts


def main() -> int:
    """Run cases and print the faults; 1 if there is any."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--family", choices=FAMILIES, help="models of this family alone")
    parser.add_argument("--verbose", action="store_true", help="print every case")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()

    def show(verdict: Verdict) -> None:
        if arguments.verbose or verdict.kind not in ("same", "refused"):
            sys.stdout.write(f"{verdict.kind}: {verdict.what}\n")
            sys.stdout.flush()

    with tempfile.TemporaryDirectory() as root:
        numbers = range(arguments.seed, arguments.seed + arguments.count)
        families = [arguments.family] if arguments.family else FAMILIES
        counts = run_all(numbers, Path(root), show, families)
    sys.stdout.write(f"{dict(counts)} in {time.monotonic() - started:.0f} s\n")
    return 0 if counts.keys() <= {"same", "refused"} else 1


if __name__ == "__main__":
    sys.exit(main())
