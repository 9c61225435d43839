"""Every byte of a plan in exactly one line: what a choice takes of the device's memory, and of the host's.

Whatever grows with the model, the context or the tree has a line of its own; libraries and contexts that a plan
cannot shrink have theirs, and one line is a stated margin for what does not grow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from subspec_cli.checkpoint.layer_tensors import LAYER_BLOCKS, LAYER_MATRICES
from subspec_cli.limits import ATTENTION_TILE_BYTES, NOISE_ROWS
from subspec_cli.planning.assumed_costs import low_bit_table_bytes
from subspec_cli.planning.request import Choice, PlanRequest
from subspec_cli.units import GIB, MIB, format_bytes

BARE_PROCESS_BYTES: Final = 448 * MIB
"""Resident set of the interpreter with all libraries imported and no model: 250 MiB measured, and what they grow
by while a model is loaded. On the CPU it comes on top of the budget, which counts from there."""
CUDA_PROCESS_BYTES: Final = 2 * GIB
"""The same beside a GPU, whose driver and kernels live in host memory too."""
CUDA_CONTEXT_BYTES: Final = 512 * MIB
"""Taken of a GPU by the driver's context and the loaded kernels, outside the allocator."""
CUDA_LIBRARY_BYTES: Final = 96 * MIB
"""cuBLAS workspaces as they are configured (8 x 4 MiB for each of two streams), and the graph of a draft step."""
RING_SLOTS: Final = 3
"""Pinned layers through which layers from disk pass: one copied, one ready, one arriving."""
_LEAST_RING_SLOTS: Final = 2
_MARGIN_BYTES: Final = 64 * MIB
"""Interpreter growth, thread stacks, kernel scratch and the allocator's own waste."""
_NOISE_BYTES: Final = 8
"""Noise of one token, float64 as `sample` adds it."""
_DRAFT_ROWS: Final = 8
_RANKED_BYTES: Final = 8
_SAMPLED_BYTES: Final = 40
"""Of a draft row's logit, with all that ranking makes of it: noise, shares and places of the filters."""
_PAGE_BYTES: Final = 4096
_ROUNDING_BYTES: Final = MIB
"""Lost per large tensor on a GPU: the allocator rounds it up to 2 MiB, by half of that on average."""
_TOKENIZER_FACTOR: Final = 8
"""Memory of a loaded tokenizer by the bytes of its files."""


@dataclass(frozen=True, slots=True)
class PlanLine:
    """One line of the byte table."""

    label: str
    size_bytes: int
    note: str = ""


class Ledger:
    """The sizes of one request, from which every choice is priced alike."""

    def __init__(self, request: PlanRequest) -> None:
        geometry = request.geometry
        self._request = request
        self._on_gpu = request.device == "cuda"
        self.layers = geometry.layers
        self.layer_bytes = geometry.layer_matrix_bytes
        self.block_bytes = max(geometry.block_bytes.values())
        self.slot_bytes = (self.layer_bytes if self._on_gpu else self.block_bytes) + (
            (32 if self._on_gpu else 8) * _PAGE_BYTES
        )
        self.ahead_bytes = self.layer_bytes // (1 if self._on_gpu else len(LAYER_BLOCKS))
        """What a slot holds on average."""
        self.row_bytes = geometry.kv_row_bytes + 3 * geometry.kv_heads * geometry.head_dim * 8
        """Bytes that one more row of context costs: keys and values, and a layer of them in float64."""
        self._tokenizer_bytes = _TOKENIZER_FACTOR * request.tokenizer_bytes
        self._low_bit_head_bytes = low_bit_table_bytes(geometry)
        self._small_bytes = (
            geometry.layers * geometry.layer_small_bytes + geometry.hidden * geometry.element_bytes
        )
        self._work_bytes = _workspace_bytes(request)
        self._noise_bytes = NOISE_ROWS * geometry.vocab * _NOISE_BYTES if request.samples else 0
        self._libraries_bytes = CUDA_CONTEXT_BYTES + CUDA_LIBRARY_BYTES if self._on_gpu else 0
        self._rounding_bytes = len(LAYER_MATRICES) * _ROUNDING_BYTES if self._on_gpu else 0
        self._fixed_bytes = (
            geometry.table_bytes
            + self._small_bytes
            + self._work_bytes
            + (0 if self._on_gpu else self._noise_bytes)
            + self._libraries_bytes
            + _MARGIN_BYTES
            + request.scratch_rows * self.row_bytes
        )

    def substitutes(self, choice: Choice) -> int:
        """How many layers have a substitute in memory."""
        return self.layers - choice.shared if choice.drafts else 0

    def base_bytes(self, choice: Choice) -> int:
        """All lines of a choice for a context of no tokens."""
        substitutes = self.substitutes(choice)
        return (
            self._fixed_bytes
            + choice.resident * self.layer_bytes
            + substitutes * (self._request.substitute_bytes or 0)
            + choice.slots * self.slot_bytes
            + (self._low_bit_head_bytes if choice.draft_head_bits == 4 else 0)
            + (self._request.geometry.table_bytes if choice.embedding == "device" else 0)
            + (choice.resident + substitutes) * self._rounding_bytes
        )

    def lines(self, choice: Choice, context: int) -> tuple[PlanLine, ...]:
        """What lies in the device's memory; the sum is `base_bytes` and `row_bytes` for each token of context."""
        geometry, substitutes = self._request.geometry, self.substitutes(choice)
        rows = context + self._request.scratch_rows
        tables = 2 if choice.embedding == "device" else 1
        substitute_bytes = substitutes * (self._request.substitute_bytes or 0)
        found = (
            PlanLine("head" if choice.embedding in ("host", "disk") else "embedding and head",
                     tables * geometry.table_bytes, _table_note(choice)),
            PlanLine("draft head", self._low_bit_head_bytes if choice.draft_head_bits == 4 else 0, "4-bit copy"),
            PlanLine("norms and biases", self._small_bytes),
            PlanLine("resident layers", choice.resident * self.layer_bytes, self._resident_note(choice)),
            PlanLine("substitutes", substitute_bytes, f"{substitutes} x {self._request.substitute_bits} bit"),
            PlanLine("stream slots", choice.slots * self.slot_bytes,
                     f"{choice.slots} x {format_bytes(self.slot_bytes)}"),
            PlanLine("KV cache", rows * geometry.kv_row_bytes, f"{rows} rows"),
            PlanLine("workspace", self._work_bytes + rows * (self.row_bytes - geometry.kv_row_bytes)),
            PlanLine("sampling noise", 0 if self._on_gpu else self._noise_bytes, f"{NOISE_ROWS} positions"),
            PlanLine("CUDA context", CUDA_CONTEXT_BYTES if self._on_gpu else 0, "outside the allocator"),
            PlanLine("library workspaces", CUDA_LIBRARY_BYTES if self._on_gpu else 0),
            PlanLine("allocator rounding", (choice.resident + substitutes) * self._rounding_bytes),
            PlanLine("margin", _MARGIN_BYTES),
        )  # fmt: skip
        return tuple(line for line in found if line.size_bytes)

    def pinned(self, choice: Choice) -> tuple[int, int] | None:
        """Streamed layers that stay in pinned memory, and slots of the ring through which the others pass.

        None where the bound on host memory holds not even a ring; on the CPU nothing is pinned.
        """
        if not self._on_gpu:
            return 0, 0
        streamed, ram_bytes = self.layers - choice.resident, self._request.ram_bytes
        if ram_bytes is None:
            return streamed, 0
        places = (ram_bytes - self._host_bytes(choice)) // self.layer_bytes
        if places >= streamed:
            return streamed, 0
        ring = min(RING_SLOTS, places)
        return (places - ring, ring) if ring >= _LEAST_RING_SLOTS else None

    def host_lines(self, choice: Choice) -> tuple[PlanLine, ...]:
        """What lies in the host's memory beside the budget."""
        if not self._on_gpu:
            return (PlanLine("bare process", BARE_PROCESS_BYTES, "beside the budget"),)
        pinned, ring = self.pinned(choice) or (0, 0)
        streamed = self.layers - choice.resident
        found = (
            PlanLine("bare process", CUDA_PROCESS_BYTES),
            PlanLine("tokenizer", self._tokenizer_bytes),
            PlanLine("embedding", self._request.geometry.table_bytes if choice.embedding == "host" else 0),
            PlanLine("sampling noise", self._pinned_noise_bytes, f"{NOISE_ROWS} positions"),
            PlanLine("pinned layers", pinned * self.layer_bytes, f"{pinned} of {streamed} streamed"),
            PlanLine("pinned ring", ring * self.layer_bytes, f"{streamed - pinned} layers pass from disk"),
        )
        return tuple(line for line in found if line.size_bytes)

    def least_host_bytes(self) -> int:
        """Host memory without which nothing runs on a GPU: a ring, and no table beside it."""
        ring_bytes = _LEAST_RING_SLOTS * self.layer_bytes
        return CUDA_PROCESS_BYTES + self._tokenizer_bytes + self._pinned_noise_bytes + ring_bytes

    def _host_bytes(self, choice: Choice) -> int:
        table_bytes = self._request.geometry.table_bytes if choice.embedding == "host" else 0
        return CUDA_PROCESS_BYTES + self._tokenizer_bytes + self._pinned_noise_bytes + table_bytes

    @property
    def _pinned_noise_bytes(self) -> int:
        """Noise on the host of a GPU, which sees twice as many positions in half as many bytes."""
        return self._noise_bytes * 2 if self._on_gpu else 0

    def _resident_note(self, choice: Choice) -> str:
        note = f"{choice.resident} of {self.layers}"
        if choice.drafts and choice.shared:
            return f"{note}, {choice.shared} also draft"
        return note


def _table_note(choice: Choice) -> str:
    places = {"host": "embedding in host RAM", "disk": "embedding on disk"}
    return places.get(choice.embedding, "")


def _workspace_bytes(request: PlanRequest) -> int:
    """Activations of the widest forward, attention's tiles and logits; the tokenizer on the host."""
    geometry = request.geometry
    width = 4 * geometry.hidden + 3 * geometry.feed_forward + 3 * geometry.heads * geometry.head_dim
    activations = request.prefill_rows * width * max(geometry.element_bytes, 4)
    tiles = 3 * ATTENTION_TILE_BYTES
    drafted = _DRAFT_ROWS * geometry.vocab * (_SAMPLED_BYTES if request.samples else _RANKED_BYTES)
    verified = request.tree_nodes * geometry.vocab * geometry.element_bytes
    # A tree is drafted while the last one's logits are there; the self-check compares those of two trees.
    logits = verified + max(verified, drafted)
    tokenizer = _TOKENIZER_FACTOR * request.tokenizer_bytes if request.device == "cpu" else 0
    return activations + tiles + logits + tokenizer
