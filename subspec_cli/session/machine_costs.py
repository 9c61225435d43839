"""What the parts of a model cost on this machine: kept from an earlier probe, probed now, or assumed. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from subspec_cli.checkpoint.geometry import ModelGeometry
from subspec_cli.errors import IntegrityError, ResourceError
from subspec_cli.planning.assumed_costs import assumed_costs
from subspec_cli.planning.costs import MachineCosts, snapped
from subspec_cli.probe.child_process import ProbeFailedError, probe_in_subprocess
from subspec_cli.probe.kept_costs import keep_costs, known_costs, probe_subject
from subspec_cli.reporter import Reporter
from subspec_cli.substitutes.settings import SubstituteSettings
from subspec_cli.units import printable

CostSource = Callable[[ModelGeometry, SubstituteSettings], MachineCosts]
"""Gives the costs of a model's shapes and of one set of substitutes."""


@dataclass(frozen=True, slots=True)
class ProbedCosts:
    """The usual source of costs."""

    directory: Path
    """Directory of the 16-bit weights, which the probe reads."""
    device: str
    """`cpu` or `cuda`."""
    reprobe: bool
    """Whether to probe again in place of what was kept."""
    reporter: Reporter
    rebuilds: bool = False
    """Whether residuals are prepared, so that rebuilding them is timed too."""

    def __call__(self, geometry: ModelGeometry, settings: SubstituteSettings) -> MachineCosts:
        """Return the kept costs, else probe, and keep the result unless the machine was busy.

        If the probe fails, assume costs and say so.
        """
        subject = probe_subject(geometry, settings, self.device, self.directory, rebuilds=self.rebuilds)
        kept = None if self.reprobe else known_costs(subject)
        if kept is not None:
            return kept
        try:
            timed = probe_in_subprocess(self.directory, settings, self.device, self.reporter, self.rebuilds)
        except ProbeFailedError as error:
            reason = printable(str(error))
            self.reporter.note(
                f"this machine could not be timed, so the plan assumes what it can do: {reason}"
            )
            return assumed_costs(geometry, self.device, settings=settings)
        if timed.trouble is not None:
            self.reporter.note(f"{timed.trouble}; these costs are for this run, the next one times it again")
            return timed.costs
        try:
            keep_costs(subject, timed.costs)
        except (ResourceError, IntegrityError) as error:  # a read-only disk is no reason not to run
            self.reporter.note(f"the next run times this machine again: {error}")
        return timed.costs


@dataclass(frozen=True, slots=True)
class SharedCosts:
    """The costs of a machine on which several replicas read at the same time, each its share of the disk's rate."""

    source: CostSource
    """Costs of a replica that has the machine for itself."""
    sharers: int
    """Replicas on the machine."""
    device: str
    """`cpu` or `cuda`."""

    def __call__(self, geometry: ModelGeometry, settings: SubstituteSettings) -> MachineCosts:
        """Return the costs with the disk's rate divided. On the CPU the link is the disk; a GPU's link is its own."""
        costs = self.source(geometry, settings)
        shared = replace(costs, disk_bytes_per_s=snapped(costs.disk_bytes_per_s / self.sharers))
        if self.device != "cpu":
            return shared
        return replace(
            shared,
            link_bytes_per_s=snapped(costs.link_bytes_per_s / self.sharers),
            pageable_bytes_per_s=snapped(costs.pageable_bytes_per_s / self.sharers),
        )
