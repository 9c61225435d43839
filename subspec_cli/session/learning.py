"""What a session learns of its drafts: counted answer by answer, kept when it ends, found by the next plan."""

from __future__ import annotations

from contextlib import suppress

from subspec_cli.config import SamplingConfig
from subspec_cli.errors import SubspecError
from subspec_cli.metrics import GenerationStats
from subspec_cli.planning.acceptance import Acceptance, acceptance_of
from subspec_cli.probe.kept_acceptance import acceptance_subject, keep_acceptance, kept_acceptance
from subspec_cli.substitutes.manifest import Manifest


class Learning:
    """Acceptance by sampling settings, of one model with one set of substitutes."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._answers: list[tuple[SamplingConfig, GenerationStats]] = []

    def add(self, sampling: SamplingConfig, stats: GenerationStats) -> None:
        """Count a speculative answer, or the part of it that was given."""
        if stats.reached_by_depth:
            self._answers.append((sampling, stats))

    def forget(self) -> None:
        """Keep nothing of the answers so far."""
        self._answers.clear()

    def keep(self) -> None:
        """Add the counts to those of earlier runs; a home that cannot be written is no reason to fail."""
        answers, self._answers = self._answers, []
        while answers:
            sampling = answers[0][0]
            stats = [found for other, found in answers if other == sampling]
            answers = [answer for answer in answers if answer[0] != sampling]
            with suppress(SubspecError):  # the next plan assumes the acceptance, and says so
                keep_acceptance(_subject(self._manifest, sampling), acceptance_of(stats))


def learned_acceptance(manifest: Manifest, sampling: SamplingConfig) -> Acceptance | None:
    """Return what earlier runs have learned; None if nothing is there."""
    return kept_acceptance(_subject(manifest, sampling))


def _subject(manifest: Manifest, sampling: SamplingConfig) -> dict[str, object]:
    return acceptance_subject(manifest.model_id, manifest.commit, manifest.settings, sampling)
