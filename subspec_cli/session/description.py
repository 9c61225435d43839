"""What a session says of itself: the model, the plan, and how far its exactness is proved."""

from __future__ import annotations

from dataclasses import dataclass

from subspec_cli.config import Config, SamplingConfig
from subspec_cli.metrics import Exactness
from subspec_cli.modeling.self_check import SelfCheck
from subspec_cli.planning.costs import PlanCosts
from subspec_cli.planning.plan import OffloadPlan
from subspec_cli.versions import __version__


@dataclass(frozen=True, slots=True)
class SessionDescription:
    """What was loaded, and what it promises."""

    model_id: str
    revision: str
    dtype: str
    """Data type of the weights, such as `bf16`."""
    config: Config
    """The settings that the session was opened with; the model's own sampling is filled in if it is used."""
    plan: OffloadPlan
    costs: PlanCosts
    """Costs of passes and draft steps: the shapes of draft trees depend on them and on tokens alone."""
    self_check: SelfCheck
    seed: int
    """Seed of the noise: the given one, or one drawn for this session."""
    end_ids: tuple[int, ...]
    """Tokens that end an answer."""
    model_sampling: SamplingConfig | None
    """Sampling by the model's own files alone, used or not; None if they hold a value that cannot be used."""
    has_chat_template: bool
    direct_io: bool
    """Whether weights are read past the page cache."""
    versions: dict[str, str]
    """Installed version of each library that results depend on."""
    notes: tuple[str, ...] = ()
    """What did not go as planned while loading, and is not fatal."""

    @property
    def device(self) -> str:
        """`cpu` or `cuda`."""
        return self.plan.device

    @property
    def budget_bytes(self) -> int:
        """Memory that the session may take of the device."""
        return self.plan.budget_bytes

    @property
    def context_tokens(self) -> int:
        """Most tokens of prompt and answer together."""
        return self.plan.context

    @property
    def fits(self) -> bool:
        """Whether the whole model fits the budget, so that nothing needs to be streamed."""
        return self.plan.fits

    @property
    def speculation(self) -> bool:
        """Whether tokens are drafted."""
        return self.plan.drafts

    @property
    def exactness(self) -> Exactness:
        """What the self-check found."""
        return self.self_check.exactness

    @property
    def fingerprint(self) -> str:
        """What decides the tokens beside a request: versions of code and model, and whether rows keep their bits."""
        return f"subspec-{__version__}-{self.revision[:8]}-{self.exactness}"

    @property
    def exactness_reason(self) -> str:
        """How exactness was checked, or what it failed on."""
        return self.self_check.reason

    @property
    def threads(self) -> int:
        """CPU threads that compute."""
        return self.self_check.threads

    @property
    def fresh_seed(self) -> bool:
        """Whether the seed was drawn for this session."""
        return self.config.sampling.seed is None
