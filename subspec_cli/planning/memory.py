"""Where a byte comes from: the memory that a layout takes on the device and on the host.

Every byte is in exactly one line. What grows with the model, the context or the tree has its own line, and so
have libraries and contexts, which a plan cannot shrink. One line is a stated margin for everything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from subspec_cli.checkpoint.layer_tensors import FEED_FORWARD, LAYER_BLOCKS, LAYER_MATRICES
from subspec_cli.limits import (
    ATTENTION_WORK_BYTES,
    LARGE_BLOCK,
    LEAST_RING_SLOTS,
    MOST_ROWS,
    NOISE_ROWS,
    SMALL_BLOCK,
)
from subspec_cli.planning.device_profile import EmbeddingPlace
from subspec_cli.planning.layer_sizes import LayerSizes
from subspec_cli.planning.library_memory import (
    bare_process_bytes,
    grammar_bytes,
    shared_layer_kernels,
    target_kernels,
    tokenizer_bytes,
    widened_bytes,
)
from subspec_cli.planning.request import PlanRequest
from subspec_cli.planning.work_memory import (
    activation_bytes,
    mask_table_bytes,
    recurrent_bytes,
    work_row_bytes,
)
from subspec_cli.substitutes.settings import substitute_head_bytes
from subspec_cli.units import MIB, counted, format_bytes

_MOST_RING_SLOTS: Final = 3
"""Pinned buffers of the ring, one layer each: one is copied, one is ready, one is being read."""
_MARGIN_BYTES: Final = 16 * MIB
"""Interpreter growth, thread stacks, kernel scratch and the allocator's own waste."""
_NOISE_BYTES: Final = 8
"""Noise of one token, float64 as the sampler adds it."""
_RANKED_BYTES: Final = 8
_SAMPLED_BYTES: Final = 40
"""Per logit of a draft row, with all that ranking makes of it: noise, probabilities and indices of the filters."""
_PAGE_BYTES: Final = 4096
_KERNEL_WORK_BYTES: Final = 4 * MIB
"""Scores and partial sums inside an attention kernel, on all threads."""

WAITING_ROWS: Final = "waiting prompt rows"
"""Label of the line for activations that wait while the weights of their next block arrive."""
HeadBits = Literal[4, 16]


class MemoryLayout(NamedTuple):
    """One way to use a budget, without the context."""

    shared: int
    """Resident layers that the draft runs too."""
    target_only: int
    """Resident layers beside which the draft keeps its substitutes."""
    drafts: bool
    """Whether there is a draft at all."""
    slots: int
    draft_head_bits: HeadBits
    """16 shares the target's head, 4 is the draft's own copy."""
    embedding: EmbeddingPlace

    @property
    def resident(self) -> int:
        """Number of resident layers of the target."""
        return self.shared + self.target_only


class PinnedLayers(NamedTuple):
    """What of the streamed layers is in pinned host memory."""

    layers: int
    """Layers that stay there."""
    ring_slots: int
    """Buffers of a layer each, through which the other streamed layers pass."""


class PromptPass(NamedTuple):
    """How a prompt is read."""

    rows: int
    """Most rows of one pass."""
    held_bytes: int
    """Activations that wait while the weights of their next block arrive."""


@dataclass(frozen=True, slots=True)
class PlanLine:
    """One line of the memory breakdown."""

    label: str
    size_bytes: int
    note: str = ""


class MemoryModel:
    """The sizes of one request. All its layouts are sized by them."""

    def __init__(self, request: PlanRequest) -> None:
        geometry, self._profile = request.geometry, request.profile
        self._request = request
        self._geometry = geometry
        self.layers = geometry.layers
        self._sizes = LayerSizes(geometry.layer_bytes)
        self.layer_bytes = self._sizes.largest
        """Bytes of the largest layer."""
        self._link_sizes = LayerSizes(geometry.link_layer_bytes)
        self._link_bytes, self.mean_link_bytes = self._link_sizes.largest, self._link_sizes.mean
        """Bytes of the largest layer as it is streamed, and of a layer on average."""
        holds_layer = self._profile.slot_unit == "layer"
        unit_bytes = self._link_bytes if holds_layer else geometry.link_block_bytes
        # In 8-bit sources, the scales of a matrix may lie elsewhere in the files.
        pages = self._profile.slot_pages * (1 if geometry.stored is None else 2)
        self.slot_bytes = unit_bytes + pages * _PAGE_BYTES
        self.mean_slot_bytes = self.mean_link_bytes // (1 if holds_layer else len(LAYER_BLOCKS))
        """Weights that a slot holds on average: blocks differ in size."""
        self._widened_bytes = widened_bytes(self._profile, geometry)
        self._work_row_bytes = work_row_bytes(geometry, request.sequences)
        self._kv_row_bytes = request.sequences * geometry.kv_row_bytes
        self.row_bytes = self._kv_row_bytes + self._work_row_bytes
        """Bytes that one more row of every sequence's context costs."""
        self._held_row_bytes = (geometry.hidden + geometry.feed_forward) * geometry.element_bytes
        """Activations of a prompt row from the gate block to the down block."""
        self._scratch_rows = _whole_blocks(request.scratch_rows)
        self._low_bit_head_bytes = substitute_head_bytes(geometry)
        self._small_bytes = geometry.small_bytes
        self._work_bytes = self._workspace_bytes()
        self._recurrent_bytes = recurrent_bytes(geometry, self._scratch_rows, request.sequences)
        noise_bytes = NOISE_ROWS * geometry.vocab * _NOISE_BYTES * request.sequences if request.samples else 0
        self._noise_bytes = noise_bytes if self._profile.budget_is_ram else 0
        self._host_noise_bytes = 0 if self._profile.budget_is_ram else 2 * noise_bytes
        """Beside a GPU: the sampler's own, and twice as many positions in float32, which the GPU reads."""
        self._rounding_bytes = len(LAYER_MATRICES) * self._profile.rounding_bytes
        """Rounding per layer."""
        kernels = target_kernels(geometry, request.prefill_rows, request.pass_nodes)
        self._kernel_bytes = kernels * self._profile.kernel_bytes
        self._fixed_bytes = (
            geometry.table_bytes
            + self._small_bytes
            + self._work_bytes
            + self._noise_bytes
            + self._profile.context_bytes
            + self._profile.library_bytes
            + self._kernel_bytes
            + _MARGIN_BYTES
            + self._scratch_rows * self.row_bytes
            + self._recurrent_bytes
        )
        self._tokenizer_bytes = tokenizer_bytes(
            request.tokenizer_bytes, self._fixed_bytes if self._profile.budget_is_ram else 0
        )
        self._grammar_bytes = grammar_bytes(geometry.vocab) if request.takes_grammars else 0
        if self._profile.budget_is_ram:
            self._fixed_bytes += self._tokenizer_bytes + self._grammar_bytes

    def substitutes(self, layout: MemoryLayout) -> int:
        """Return how many layers have a substitute in memory."""
        return self.layers - layout.shared if layout.drafts else 0

    def base_bytes(self, layout: MemoryLayout) -> int:
        """Return the sum of all lines for a context of no tokens."""
        substitutes = self.substitutes(layout)
        return (
            self._fixed_bytes
            + self._sizes.most(layout.resident)
            + self._substitute_bytes(substitutes)
            + layout.slots * self.slot_bytes
            + (self._widened_bytes if layout.slots else 0)
            + (self._low_bit_head_bytes if layout.draft_head_bits == 4 else 0)
            + self._draft_kernel_bytes(layout)
            + (self._geometry.table_bytes if layout.embedding == "device" else 0)
            + (layout.resident + substitutes) * self._rounding_bytes
        )

    def whole_model_bytes(self, embedding: EmbeddingPlace, context: int) -> int:
        """Return what plain decoding takes with all layers resident."""
        whole = MemoryLayout(0, self.layers, False, 0, 16, embedding)
        return self.base_bytes(whole) + self.context_bytes(context)

    def context_bytes(self, context: int) -> int:
        """Return what a context adds to `base_bytes`: the KV cache has a whole number of blocks of rows."""
        return _whole_blocks(context) * self.row_bytes

    def largest_context(self, size_bytes: int) -> int:
        """Return the longest context for so many bytes beside `base_bytes`."""
        return max(0, size_bytes) // self.row_bytes // SMALL_BLOCK * SMALL_BLOCK

    def prompt_pass(self, layout: MemoryLayout, context: int, free_bytes: int) -> PromptPass:
        """Return how many rows of a prompt go through one pass, with `free_bytes` left of the budget.

        Where a layer's feed-forward lies together in the slots, chunks go through it one after another, and one pass
        reads any prompt. Otherwise the activations of all rows wait between its blocks: as many as the memory holds.
        """
        if layout.resident == self.layers or self._profile.slot_unit == "layer":
            return PromptPass(context, 0)
        if layout.slots > len(FEED_FORWARD) and self._geometry.stored is None:
            return PromptPass(context, 0)
        waiting = min(context, free_bytes // self._held_row_bytes)
        return PromptPass(min(context, waiting + self._request.prefill_rows), waiting * self._held_row_bytes)

    def lines(self, layout: MemoryLayout, context: int, prompt: PromptPass) -> tuple[PlanLine, ...]:
        """Break down the device's memory.

        The sum is `base_bytes`, `context_bytes`, and what waits of a prompt.
        """
        geometry, profile, substitutes = self._geometry, self._profile, self.substitutes(layout)
        rows = _whole_blocks(context) + self._scratch_rows
        tables = 2 if layout.embedding == "device" else 1
        substitute_bytes = self._substitute_bytes(substitutes)
        found = (
            PlanLine("head" if layout.embedding in ("host", "disk") else "embedding and head",
                     tables * geometry.table_bytes, _table_note(layout)),
            PlanLine("draft head", self._low_bit_head_bytes if layout.draft_head_bits == 4 else 0, "4-bit copy"),
            PlanLine("norms and biases", self._small_bytes),
            PlanLine("resident layers", self._sizes.most(layout.resident), self._resident_note(layout)),
            PlanLine("substitutes", substitute_bytes, f"{substitutes} x {self._request.substitute_bits} bit"),
            PlanLine("stream slots", layout.slots * self.slot_bytes,
                     f"{layout.slots} x {format_bytes(self.slot_bytes)}"),
            PlanLine("rebuilt weights" if self._request.streams_residuals else "widened weights",
                     self._widened_bytes if layout.slots else 0,
                     "from residuals" if self._request.streams_residuals else "8 bits to 16"),
            PlanLine("KV cache", rows * self._kv_row_bytes, f"{self._each()}{rows} rows"),
            PlanLine("recurrent state", self._recurrent_bytes, f"{self._each()}{len(geometry.delta)} layers"),
            PlanLine("workspace", self._work_bytes + rows * self._work_row_bytes),
            PlanLine(WAITING_ROWS, prompt.held_bytes, f"{counted(prompt.rows, 'row')} a pass"),
            PlanLine("sampling noise", self._noise_bytes, f"{self._each()}{NOISE_ROWS} positions"),
            PlanLine("tokenizer", self._tokenizer_bytes if profile.budget_is_ram else 0),
            PlanLine("grammars", self._grammar_bytes if profile.budget_is_ram else 0, "of JSON formats"),
            PlanLine("kernels", self._kernel_bytes + self._draft_kernel_bytes(layout), "compiled at first use"),
            PlanLine("CUDA context", profile.context_bytes, "outside the allocator"),
            PlanLine("libraries", profile.library_bytes),
            PlanLine("allocator rounding", (layout.resident + substitutes) * self._rounding_bytes),
            PlanLine("margin", _MARGIN_BYTES),
        )  # fmt: skip
        return tuple(line for line in found if line.size_bytes)

    def pinned(self, layout: MemoryLayout) -> PinnedLayers | None:
        """Return what of the streamed layers is pinned, as much as the limit of host memory allows.

        None if the limit does not even hold a ring. Nothing is pinned where slots are read straight from disk.
        """
        if self._profile.streams_from_disk:
            return PinnedLayers(0, 0)
        streamed, ram_bytes = self.layers - layout.resident, self._request.ram_bytes
        if ram_bytes is None:
            return PinnedLayers(streamed, 0)
        free_bytes = ram_bytes - self._bare_host_bytes() - self._host_table_bytes(layout)
        places = free_bytes // self._link_bytes
        if places >= streamed:
            return PinnedLayers(streamed, 0)
        ring = min(_MOST_RING_SLOTS, places)
        return PinnedLayers(places - ring, ring) if ring >= LEAST_RING_SLOTS else None

    def host_lines(self, layout: MemoryLayout) -> tuple[PlanLine, ...]:
        """Break down the host memory beside the budget."""
        process_bytes = bare_process_bytes(self._profile, self._geometry)
        if self._profile.budget_is_ram:
            return (PlanLine("bare process", process_bytes),)
        pinned, ring = self.pinned(layout) or PinnedLayers(0, 0)
        streamed = self.layers - layout.resident
        found = (
            PlanLine("bare process", process_bytes),
            PlanLine("tokenizer", self._tokenizer_bytes),
            PlanLine("grammars", self._grammar_bytes, "of JSON formats"),
            PlanLine("embedding", self._host_table_bytes(layout)),
            PlanLine("sampling noise", self._host_noise_bytes, f"{self._each()}{NOISE_ROWS} positions"),
            PlanLine("pinned layers", self._link_sizes.most(pinned), f"{pinned} of {streamed} streamed"),
            PlanLine(
                "pinned ring", ring * self._link_bytes, f"{counted(streamed - pinned, 'layer')} from disk"
            ),
        )
        return tuple(line for line in found if line.size_bytes)

    def least_host_bytes(self) -> int:
        """Return the least host memory beside a GPU: a ring, and no embedding."""
        return self._bare_host_bytes() + LEAST_RING_SLOTS * self._link_bytes

    def _bare_host_bytes(self) -> int:
        """Host memory beside a GPU without layers and embedding."""
        return (
            bare_process_bytes(self._profile, self._geometry)
            + self._tokenizer_bytes
            + self._grammar_bytes
            + self._host_noise_bytes
        )

    def _host_table_bytes(self, layout: MemoryLayout) -> int:
        return self._geometry.table_bytes if layout.embedding == "host" else 0

    def _substitute_bytes(self, count: int) -> int:
        sizes = self._request.substitute_bytes
        return 0 if sizes is None else sizes.most(count)

    def _each(self) -> str:
        """How often there is what every sequence has, before a count; empty for one sequence."""
        return f"{self._request.sequences} x " if self._request.sequences > 1 else ""

    def _resident_note(self, layout: MemoryLayout) -> str:
        note = f"{layout.resident} of {self.layers}"
        if layout.drafts and layout.shared:
            return f"{note}, {layout.shared} also draft"
        return note

    def _workspace_bytes(self) -> int:
        """Activations of the widest forward, attention's results and logits."""
        geometry, request = self._geometry, self._request
        element_bytes = geometry.element_bytes
        heads_width = max(shape.query_width for shape in geometry.attention)
        activations = request.prefill_rows * activation_bytes(geometry)
        masks = sum(mask_table_bytes(*key, element_bytes) for key in geometry.mask_keys)
        blocks = request.model_context // LARGE_BLOCK + LARGE_BLOCK // SMALL_BLOCK + 2
        results = request.prefill_rows * heads_width * (blocks * element_bytes + 12)
        tiles = min(results, ATTENTION_WORK_BYTES) + _KERNEL_WORK_BYTES + masks
        drafted = MOST_ROWS * geometry.vocab * (_SAMPLED_BYTES if request.samples else _RANKED_BYTES)
        verified = request.pass_nodes * geometry.vocab * geometry.element_bytes
        # A tree is drafted while the last tree's logits are still held; the self-check compares those of two trees.
        logits = verified + max(verified, drafted)
        return activations + tiles + logits

    def _draft_kernel_bytes(self, layout: MemoryLayout) -> int:
        """Kernels of 16-bit matrices in draft steps: of resident layers, and of the target's head."""
        if not layout.drafts:
            return 0
        kernels = shared_layer_kernels(self._geometry) if layout.shared else 0
        kernels += MOST_ROWS if layout.draft_head_bits == 16 else 0
        return kernels * self._profile.kernel_bytes


def _whole_blocks(rows: int) -> int:
    return -(-rows // SMALL_BLOCK) * SMALL_BLOCK


def _table_note(layout: MemoryLayout) -> str:
    places = {"host": "embedding in host RAM", "disk": "embedding on disk"}
    return places.get(layout.embedding, "")
