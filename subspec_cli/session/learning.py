"""What a session learns: what was accepted of its drafts, and how fast its passes read the disk.

It is counted answer by answer, kept when the session ends, and found by the next plan.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Final

from subspec_cli.config import SamplingConfig
from subspec_cli.errors import SubspecError
from subspec_cli.metrics import GenerationStats
from subspec_cli.planning.acceptance import Acceptance, acceptance_of
from subspec_cli.probe.kept_acceptance import acceptance_subject, keep_acceptance, kept_acceptance
from subspec_cli.probe.kept_rates import keep_rate, streaming
from subspec_cli.substitutes.manifest import Manifest

_LEAST_LINK_S: Final = 1.0
"""Less reading says little of a disk's rate."""


class Learning:
    """Acceptance by sampling settings, of one model with one set of substitutes; and the rate of a disk."""

    def __init__(self, manifest: Manifest, disk: int | None) -> None:
        """`disk` is the device number of the disk that passes read past the page cache; None learns no rate."""
        self._manifest = manifest
        self._disk = disk
        self._answers: list[tuple[SamplingConfig, GenerationStats]] = []
        self._streamed_bytes, self._link_s = 0, 0.0

    def add(self, sampling: SamplingConfig, stats: GenerationStats) -> None:
        """Count an answer, or the part of it that was given."""
        self._streamed_bytes += stats.streamed_bytes
        self._link_s += stats.link_time_s
        if stats.reached_by_depth:
            self._answers.append((sampling, stats))

    def forget(self) -> None:
        """Keep nothing of the answers so far."""
        self._answers.clear()
        self.forget_disk()

    def forget_disk(self) -> None:
        """Keep nothing of how the disk was read so far."""
        self._streamed_bytes, self._link_s = 0, 0.0

    def keep(self) -> None:
        """Add the counts to those of earlier runs; a home that cannot be written is no reason to fail."""
        if self._disk is not None and self._link_s >= _LEAST_LINK_S:
            keep_rate(streaming(self._disk), self._streamed_bytes, self._link_s)
        self.forget_disk()
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
