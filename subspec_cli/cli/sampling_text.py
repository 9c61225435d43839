"""How tokens are chosen, in the words of the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from subspec_cli.config import SamplingConfig

if TYPE_CHECKING:
    from subspec_cli.session import Session


def sampling_words(sampling: SamplingConfig) -> str:
    """What chooses a token, such as `T 0.7, top-p 0.8, rep 1.05`; filters count only above temperature 0."""
    words = ["greedy" if sampling.is_greedy else f"T {sampling.temperature:g}"]
    if not sampling.is_greedy:
        filters = (("top-p", sampling.top_p, 1), ("top-k", sampling.top_k, 0), ("min-p", sampling.min_p, 0))
        words += [f"{name} {value:g}" for name, value, usual in filters if value != usual]
    penalties = (
        ("rep", sampling.repetition_penalty, 1),
        ("presence", sampling.presence_penalty, 0),
        ("frequency", sampling.frequency_penalty, 0),
    )
    words += [f"{name} {value:g}" for name, value, usual in penalties if value != usual]
    if sampling.logit_bias:
        words.append(f"bias on {len(sampling.logit_bias)}")
    return ", ".join(words)


def chat_sampling_line(session: Session) -> str:
    """The line of a chat's header that says how tokens are chosen, and by whom."""
    sampling = session.description.config.sampling
    owner = ""
    if sampling.source == "model":
        owner = "model's and yours: " if sampling.given - {"source", "seed"} else "model's own: "
    return f"sampling {owner}{sampling_words(sampling)}"


def unused_sampling_hint(session: Session) -> str:
    """What `run` says if the model has sampling settings of its own, and the user said nothing; else empty."""
    about = session.description
    if about.config.sampling.given - {"seed"} or about.model_sampling is None:
        return ""
    own = sampling_words(about.model_sampling)
    if own == sampling_words(about.config.sampling):
        return ""
    return f"the model's own sampling, {own}, is not used: --sampling model takes it"
