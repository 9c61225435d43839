"""Time the products of a draft step on the CPU: all 4-bit matrices of a model once, by rows, for each kernel in turn.

    python scripts/int4_rate.py MODEL_DIRECTORY [--rows 1 2 3 4 6 8] [--repeats 5]

Between products a small operation runs, as in a draft step. Codes are random; only time is measured.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from subspec_cli.session.openmp import set_openmp_defaults

set_openmp_defaults()

import torch  # noqa: E402 - OpenMP's settings are read when torch is imported
from torch import Tensor  # noqa: E402

from subspec_cli.checkpoint.checkpoint import open_checkpoint  # noqa: E402
from subspec_cli.checkpoint.repository import read_repository  # noqa: E402
from subspec_cli.modeling.int4_product import Int4Product, dot_product  # noqa: E402
from subspec_cli.substitutes.settings import group_size_for  # noqa: E402

FUSED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
Matrix = tuple[Tensor, int, Tensor]
"""Packed codes, group size, scales and zeros."""


def matrices(directory: Path) -> list[Matrix]:
    """The matrices of all layers, those with the same input as one."""
    geometry, found = read_repository(open_checkpoint(directory)).geometry, []
    for layer in range(geometry.layers):
        shapes = geometry.layer_shapes(layer)
        for names in FUSED:
            parts = [shape for name, shape in shapes.items() if name.removesuffix(".weight").endswith(names)]
            outputs, inputs = sum(shape[0] for shape in parts if len(shape) == 2), parts[0][1]
            group_size = group_size_for((outputs, inputs))
            assert group_size is not None
            packed = torch.randint(0, 255, (outputs, inputs // 2), dtype=torch.uint8)
            pairs = torch.full((inputs // group_size, outputs, 2), 0.01, dtype=torch.bfloat16)
            found.append((packed, group_size, pairs))
    return found


@torch.inference_mode()
def seconds(product: Int4Product, held: list[Matrix], rows: int) -> float:
    """Time all products once."""
    begin = time.perf_counter()
    for packed, group_size, pairs in held:
        inputs = torch.ones((rows, 2 * packed.shape[1]), dtype=torch.bfloat16)
        product(inputs.mul_(0.5), packed, group_size, pairs)
    return time.perf_counter() - begin


def main() -> None:
    """Print milliseconds by rows: the median of each kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    held = matrices(options.directory)
    kernels: dict[str, Int4Product] = {"torch": torch._weight_int4pack_mm_for_cpu}
    dots = dot_product()
    if dots is not None:
        kernels["8-bit dots"] = dots
    print(f"{sum(packed.numel() for packed, _, _ in held) / 1e6:.0f} MB, {torch.get_num_threads()} threads")
    for rows in options.rows:
        times: dict[str, list[float]] = {name: [] for name in kernels}
        for _ in range(options.repeats + 1):
            for name, product in kernels.items():
                times[name].append(seconds(product, held, rows))
        medians = (f"{name} {statistics.median(found[1:]) * 1e3:.1f} ms" for name, found in times.items())
        print(f"{rows} rows: {', '.join(medians)}")


if __name__ == "__main__":
    main()
