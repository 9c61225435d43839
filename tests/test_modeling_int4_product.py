"""The fast product with 4-bit matrices, against the same rounding of activations in float64."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from subspec_cli.modeling import int4_product as module
from subspec_cli.modeling.int4_product import DotProduct, dot_product, int4_product

CPU = torch.device("cpu")


@pytest.fixture
def product() -> DotProduct:
    found = dot_product()
    if found is None:
        pytest.skip("numba is not installed, or the processor has no 8-bit dot products")
    return found


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Give back the thread count."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def matrix(outputs: int, inputs: int, group_size: int) -> tuple[Tensor, tuple[Tensor, int, Tensor]]:
    """A matrix in float64, and what the kernels take: packed codes, group size, scales and zeros."""
    codes = torch.randint(16, (outputs, inputs), dtype=torch.int32)
    scales_and_zeros = torch.randn(inputs // group_size, outputs, 2).bfloat16()
    scale, zero = scales_and_zeros.double().transpose(0, 1).repeat_interleave(group_size, 1).unbind(-1)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 2)
    return (codes - 8) * scale + zero, (packed, group_size, scales_and_zeros)


def rounded(rows: Tensor, group_size: int) -> Tensor:
    """Rows in int8 with a scale for each group, in float64."""
    groups = rows.float().view(len(rows), -1, group_size)
    largest = groups.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(largest, 127) / largest  # a number divided by a tensor is rounded twice
    return ((groups * inverse).round().double() * (largest.double() / 127)).view(rows.shape)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 17])
@pytest.mark.parametrize(("outputs", "inputs", "group_size"), [(64, 32, 32), (192, 192, 64), (320, 384, 128)])
def test_results_are_those_of_rounded_activations(product, outputs, inputs, group_size, rows):
    weight, given = matrix(outputs, inputs, group_size)
    numbers = torch.randn(rows, inputs).bfloat16()
    found = product(numbers, *given).double()
    expected = rounded(numbers, group_size) @ weight.T
    # Rounding to bfloat16, and float32 sums beside it.
    assert (found - expected).abs().le(expected.abs() * 2**-8 + 1e-5 * inputs).all()
    # What rounding the activations changes: half a step for each weight.
    step = numbers.float().view(rows, -1, group_size).abs().amax(-1).double() / 127
    bound = step @ weight.view(outputs, -1, group_size).abs().sum(-1).T / 2
    exact = numbers.double() @ weight.T
    assert (found - exact).abs().le(bound + exact.abs() * 2**-7 + 1e-5 * inputs).all()


def test_neither_threads_nor_other_rows_change_a_bit(product):
    _, given = matrix(448, 256, 64)
    rows = torch.randn(11, 256).bfloat16()
    torch.set_num_threads(1)
    alone = torch.cat([product(row, *given) for row in rows.split(1)])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for count in (2, 3, 5, 8, 11):
            assert torch.equal(product(rows[:count], *given), alone[:count])


def test_every_code_counts_at_its_place(product):
    """One code of 8 among zeros, everywhere: the layout of torch's packing."""
    inputs = torch.eye(32).bfloat16()
    codes = torch.full((64, 32), 8, dtype=torch.int32)
    scales_and_zeros = torch.tensor([1.0, 0.0]).bfloat16().expand(1, 64, 2).contiguous()
    for place in range(64 * 32):
        raised = codes.clone()
        raised.view(-1)[place] = 15
        packed = torch._convert_weight_to_int4pack_for_cpu(raised, 2)
        assert torch.equal(product(inputs, packed, 32, scales_and_zeros).T, (raised - 8).bfloat16())


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-38, 1e34])
def test_extreme_rows_give_finite_numbers(product, size):
    weight, given = matrix(64, 64, 32)
    rows = (torch.ones(3, 64) * size).bfloat16()
    scale = weight.abs().sum(1).max()
    found = product(rows, *given).double()
    assert (found - rows.double() @ weight.T).abs().max() <= 0.01 * size * scale + 1e-35


def test_strided_rows_are_read_in_order(product):
    _, given = matrix(64, 64, 32)
    rows = torch.randn(64, 4).bfloat16().T
    assert torch.equal(product(rows, *given), product(rows.contiguous(), *given))


def test_matrices_that_torch_packs_otherwise_have_its_kernel(product):
    assert int4_product(CPU, 128) is product
    assert int4_product(CPU, 80) is torch._weight_int4pack_mm_for_cpu


def wrong_order(*given) -> Tensor:
    return torch._weight_int4pack_mm_for_cpu(*given).roll(1, -1)


def wrong_numbers(*given) -> Tensor:
    return torch._weight_int4pack_mm_for_cpu(*given) * float("nan")


@pytest.mark.parametrize("wrong", [wrong_order, wrong_numbers])
def test_a_kernel_that_differs_is_not_used(wrong: Callable[..., Tensor]):
    assert module._agrees(torch._weight_int4pack_mm_for_cpu)
    assert not module._agrees(wrong)


def test_torch_has_the_product_without_numba_or_its_openmp(monkeypatch):
    search = dot_product.__wrapped__
    with monkeypatch.context() as patch:
        patch.setattr(module, "threads_entry", lambda: None)
        assert search() is None
    monkeypatch.setitem(sys.modules, "subspec_cli.modeling.int4_code", None)
    monkeypatch.delattr(sys.modules["subspec_cli.modeling"], "int4_code", raising=False)
    assert search() is None
