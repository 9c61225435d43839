"""Properties of CPU and CUDA devices that plans depend on: stream units, fixed memory sizes, option names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from subspec_cli.units import GIB, MIB
from subspec_cli.versions import torch_has_gpu_code

DeviceKind = Literal["cpu", "cuda"]
SlotUnit = Literal["block", "layer"]
EmbeddingPlace = Literal["tied", "device", "host", "disk"]
"""`tied` to the head, on the `device`, in `host` memory or on `disk`."""


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """One kind of device."""

    kind: DeviceKind
    budget_option: str
    """Flag of the memory budget, as messages print it."""
    budget_is_ram: bool
    """Whether the budget is host memory. Then the tokenizer and the sampling noise count against it."""
    streams_from_disk: bool
    """Whether streamed weights are read from disk into the slots. Otherwise they wait in pinned host memory, or
    are read from disk through a pinned ring."""
    slot_unit: SlotUnit
    """What one slot of the stream holds."""
    slot_counts: tuple[int, ...]
    """Slot counts to choose from, ascending."""
    slot_pages: int
    """Pages that alignment may add to a slot."""
    widened_blocks: int
    """Blocks of an 8-bit source that are held in 16 bits at once."""
    untied_places: tuple[EmbeddingPlace, ...]
    """Where an embedding can be if it is not tied to the head."""
    tree_nodes: int
    """Most nodes of a draft tree, unless a fixed shape needs more."""
    process_bytes: int
    """Host memory of the interpreter with all libraries imported and no model."""
    context_bytes: int
    """Device memory of the driver's context and the loaded kernels, outside the allocator."""
    library_bytes: int
    """Library workspaces and captured graphs on a GPU; on the CPU the libraries' code that a run first touches."""
    kernel_bytes: int
    """Memory of one kernel that is compiled for a shape of weights and a row count."""
    rounding_bytes: int
    """Device memory lost per large tensor, because the allocator rounds sizes up."""


_CPU: Final = DeviceProfile(
    kind="cpu",
    budget_option="--memory-gb",
    budget_is_ram=True,
    streams_from_disk=True,
    slot_unit="block",
    slot_counts=(2, 4, 5, 8),
    slot_pages=8,
    # A prompt's rows that wait between blocks take less memory than two further blocks.
    widened_blocks=1,
    untied_places=("disk",),
    # More nodes give 1 to 3 % more tokens a second on two cores, and take the memory of a slot.
    tree_nodes=64,
    # 255 MiB measured, and 345 MiB where transformers imports more for a model's type. It is beside the budget.
    # PyTorch's build for CUDA takes 550 to 700 MiB, also where no GPU is used.
    process_bytes=(704 if torch_has_gpu_code() else 384) * MIB,
    context_bytes=0,
    # 24 to 28 MiB measured: pages of torch's, oneDNN's and MKL's files that become resident when they first run.
    library_bytes=28 * MIB,
    # 0.55 to 0.65 MiB measured for oneDNN's, over some sixty of them.
    kernel_bytes=13 * MIB // 20,
    rounding_bytes=0,
)
_CUDA: Final = DeviceProfile(
    kind="cuda",
    budget_option="--vram-gb",
    budget_is_ram=False,
    streams_from_disk=False,
    slot_unit="layer",
    slot_counts=(2, 3),
    slot_pages=32,
    widened_blocks=4,
    untied_places=("host", "device"),
    tree_nodes=128,
    # The driver and its kernels take host memory too.
    process_bytes=2 * GIB,
    context_bytes=512 * MIB,
    # cuBLAS workspaces as they are configured (8 x 4 MiB for each of two streams), and the graph of a draft step.
    library_bytes=96 * MIB,
    kernel_bytes=0,
    # PyTorch's allocator rounds a large tensor up to 2 MiB, by half of that on average.
    rounding_bytes=MIB,
)
_PROFILES: Final[Mapping[str, DeviceProfile]] = MappingProxyType({"cpu": _CPU, "cuda": _CUDA})


def device_profile(name: str) -> DeviceProfile:
    """Return the profile of `cpu` or `cuda`, as PyTorch names them; raises KeyError for any other device."""
    return _PROFILES[name]
