"""What a grammar lets come next on a path. The states are values: a node's state is made from its parent's."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Constraint(Protocol):
    """The state of a grammar behind a path of tokens. `V` is the size of the vocabulary."""

    @property
    def failure(self) -> str | None:
        """Why the grammar cannot go on; None if it can. Then only tokens that end an answer are allowed."""
        ...

    def after(self, token_id: int) -> Constraint:
        """Return the state behind one more token."""
        ...

    def allowed(self) -> NDArray[np.bool_]:
        """Return a mask `[V]` of the tokens that may come next; at least one may."""
        ...
