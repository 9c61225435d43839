"""Memory that GPU and host both address for captured draft steps: inputs, results and sampling noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from subspec_cli.decoding.sampler import Sampler
from subspec_cli.drafting.draft_steps import Feed, Found
from subspec_cli.limits import NOISE_ROWS
from subspec_cli.modeling.token_batch import TokenBatch
from subspec_cli.streaming.mapped_memory import gpu_view

TURNS: Final = 2
"""Sets of inputs and results: one for the step in flight, one for the step that the host fills or reads."""
_NOISE_PLACES: Final = 2 * NOISE_ROWS
"""Positions whose noise the GPU can read, in float32: twice as many as the sampler keeps in float64."""


class MappedTensor:
    """A tensor in pinned host memory, and the GPU's view of the same bytes."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.host: Tensor = torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")
        self.gpu = gpu_view(self.host, device)


class StepBuffers:
    """Inputs and results of draft steps, each in two sets that take turns.

    A captured graph has fixed arguments, so the GPU keeps its own counter of turns to select the set of a step.
    """

    def __init__(self, most_rows: int, ranked: int, capacity: int, device: torch.device) -> None:
        self.ranked = ranked
        self.numbers = MappedTensor((TURNS, 5, most_rows), torch.int32, device)
        """Tokens, places of fed tokens in `last_found`, positions, cache rows, places in the noise ring."""
        self.allowed = MappedTensor((TURNS, most_rows, capacity), torch.uint8, device)
        """Which cache rows each row attends to."""
        self.key_positions = MappedTensor((TURNS, capacity), torch.int32, device)
        self.rule = MappedTensor((TURNS, 4), torch.float32, device)
        """Temperature, top-k, top-p and min-p."""
        self.ids = MappedTensor((TURNS, most_rows, ranked), torch.int32, device)
        self.scores = MappedTensor((TURNS, most_rows, ranked), torch.float32, device)
        self.turn = torch.zeros(1, dtype=torch.long, device=device)
        """The set of the next step, counted on the GPU."""
        self.last_found = torch.zeros(most_rows * ranked, dtype=torch.long, device=device)
        """Token ids that the last step found, row by row."""
        self.host_turn = 0
        """The set that the host fills next."""

    def fill(self, batch: TokenBatch, feeds: Sequence[Feed | None], end: int, columns: int) -> None:
        """Write the inputs of the step whose turn it is; `end` cache rows are real, `columns` are in view."""
        turn, rows = self.host_turn, batch.rows
        places = [-1 if feed is None else feed.row * self.ranked + feed.rank for feed in feeds]
        numbers, allowed = self.numbers.host[turn, :, :rows], self.allowed.host[turn, :rows]
        numbers[0] = batch.token_ids
        numbers[1] = torch.tensor(places)
        numbers[2] = batch.positions
        numbers[3] = torch.arange(end - rows, end)
        allowed[:, :end] = batch.allowed
        allowed[:, end:columns] = 0
        self.key_positions.host[turn, :end] = batch.key_positions

    def fill_sampling(self, noise_places: Sequence[int], rule: Tensor) -> None:
        """Write the places of the step's noise, and the `[4]` numbers of the sampler's rule."""
        self.numbers.host[self.host_turn, 4, : len(noise_places)] = torch.tensor(noise_places)
        self.rule.host[self.host_turn] = rule

    def end_host_turn(self) -> int:
        """Go on to the next set; return the turn that was just filled."""
        turn, self.host_turn = self.host_turn, (self.host_turn + 1) % TURNS
        return turn

    def reset(self) -> None:
        """Set host and GPU back to the first turn."""
        self.turn.zero_()
        self.host_turn = 0

    def found(self, turn: int, rows: int) -> Found:
        """Return the results of a finished turn."""
        ids, scores = self.ids.host[turn, :rows], self.scores.host[turn, :rows]
        return Found(ids.long().numpy(), scores.double().numpy())


class NoiseRing:
    """Sampling noise of recent positions, in memory that the GPU reads; allocated when a sampler first has noise."""

    def __init__(self, vocab: int, device: torch.device) -> None:
        self._vocab = vocab
        self._device = device
        self._memory: MappedTensor | None = None
        self._position_of: dict[int, int] = {}
        self._in_use: list[int] = []

    @property
    def gpu(self) -> Tensor:
        """`[places, V]` float32."""
        assert self._memory is not None
        return self._memory.gpu

    def forget(self) -> None:
        """Drop the noise, because another sampler begins."""
        self._position_of.clear()
        self._in_use = []

    def places(
        self, positions: Sequence[int], sampler: Sampler, wait: Callable[[], None]
    ) -> list[int] | None:
        """Return the places of the noise of these positions, and write noise that is missing; None if there is none.

        `wait` returns once no step in flight reads the ring.
        """
        places = []
        for position in positions:
            place = position % _NOISE_PLACES
            if self._position_of.get(place) != position:
                if place in self._in_use:
                    wait()  # the step in flight reads the noise of another position at this place
                noise = sampler.noise(position, self._vocab)
                if noise is None:
                    return None
                if self._memory is None:
                    self._memory = MappedTensor((_NOISE_PLACES, self._vocab), torch.float32, self._device)
                self._memory.host[place] = torch.from_numpy(noise)
                self._position_of[place] = position
            places.append(place)
        self._in_use = places
        return places
