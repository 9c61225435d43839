"""Rounding for a model's own inputs, against its definition; and the sums that it goes by, against the inputs."""

import pytest
import tiny_models
import torch

from subspec_cli.decoding.row_groups import prompt_groups
from subspec_cli.modeling import input_moments, tuned_rounding
from subspec_cli.modeling.input_moments import InputMoments, MeasuredInputs, MeasuringTarget, measured_name
from subspec_cli.modeling.quantization import quantize_layer
from subspec_cli.modeling.substitute import unpack_codes
from subspec_cli.modeling.target_flow import SequenceRows
from subspec_cli.modeling.tuned_rounding import ErrorFeedback
from subspec_cli.substitutes.settings import SubstituteSettings

one_thread = tiny_models.one_thread
tiny = tiny_models.tiny
FEATURES, OUTPUTS, GROUP = 256, 32, 32


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks, and several lazy updates within one."""
    monkeypatch.setattr(input_moments, "MOMENT_BLOCK", 128)
    monkeypatch.setattr(tuned_rounding, "_LAZY_FEATURES", 16)


def related_inputs(rows=96):
    """Rows whose features move together, as those of trained models do."""
    made = torch.Generator().manual_seed(3)
    mixed = torch.randn(rows, 16, generator=made) @ torch.randn(16, FEATURES, generator=made)
    return mixed + 0.3 * torch.randn(rows, FEATURES, generator=made)


def weight():
    return (torch.randn(OUTPUTS, FEATURES, generator=torch.Generator().manual_seed(4)) * 0.02).bfloat16()


def moments_of(inputs):
    moments = InputMoments(inputs.shape[1])
    for part in inputs.split(40):
        moments.add(part)
    return moments


def measured(fit, check):
    return {"mlp.down_proj": MeasuredInputs(moments_of(fit), moments_of(check))}


def directly(total, rows, scale, zero):
    """Codes of a block, one feature after another: the others take the place that leaves the outputs nearest."""
    wide = total.double()
    wide += torch.eye(len(wide)) * (tuned_rounding._DAMPING * wide.diagonal().mean())
    order = torch.argsort(wide.diagonal(), descending=True, stable=True).tolist()
    now, codes = rows.double().clone(), torch.empty(rows.shape)
    for number, feature in enumerate(order):
        group = feature // GROUP
        codes[:, feature] = ((now[:, feature] - zero[:, group]) / scale[:, group]).round().clamp(-8, 7)
        error = now[:, feature] - (codes[:, feature] * scale[:, group] + zero[:, group])
        left = order[number + 1 :]
        if left:
            moved = torch.linalg.solve(wide[left][:, left], wide[left][:, [feature]])
            now[:, left] += error[:, None] * moved.T
    return (codes + 8).to(torch.uint8)


def test_codes_are_those_of_the_definition():
    moments, rows = moments_of(related_inputs()), weight()
    found = ErrorFeedback(moments).round(rows, 4, GROUP)
    scale, zero = (part.double() for part in found.grid.kernel_pairs(4))
    for block, total in enumerate(moments.sums):
        features, groups = slice(128 * block, 128 * block + 128), slice(4 * block, 4 * block + 4)
        wanted = directly(total, rows[:, features], scale[:, groups], zero[:, groups])
        assert (found.codes[:, features] != wanted).float().mean() < 0.005  # ties of rounding


@pytest.mark.parametrize("bits", [4, 2])
def test_outputs_err_less_in_the_same_bytes(bits):
    tensors, settings = {"mlp.down_proj.weight": weight()}, SubstituteSettings(bits, "minmax")
    fit, inputs = related_inputs(192).split(96)
    plain, tuned = (quantize_layer(tensors, settings, found) for found in (None, measured(fit, inputs)))

    def output_error(made):
        stored = {name.rpartition(".")[2]: tensor for name, tensor in made.tensors.items()}
        codes = unpack_codes(stored["codes"], bits).float()
        restored = (codes * stored["scale"].float() - stored["shift"].float()).view(OUTPUTS, FEATURES)
        return float((inputs @ (restored - weight().float()).T).square().sum())

    assert {n: (t.shape, t.dtype) for n, t in plain.tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in tuned.tensors.items()
    }
    outputs = tuned.quality["down"].outputs
    assert outputs.rows == len(inputs)
    assert outputs.is_tuned
    assert output_error(tuned) < 0.5 * output_error(plain)
    assert plain.quality["down"].outputs is None


def test_a_matrix_that_tuning_would_harm_is_rounded_plainly(monkeypatch):
    tensors, settings = {"mlp.down_proj.weight": weight()}, SubstituteSettings(4, "minmax")
    found = measured(related_inputs(), related_inputs())
    monkeypatch.setattr(tuned_rounding, "_round_block", lambda rows, *_: torch.zeros(rows.shape))
    made = quantize_layer(tensors, settings, found)
    assert not made.quality["down"].outputs.is_tuned
    for name, tensor in quantize_layer(tensors, settings).tensors.items():
        assert made.tensors[name].equal(tensor)


def test_inputs_that_overflow_leave_a_matrix_as_it_is():
    tensors, settings = {"mlp.down_proj.weight": weight()}, SubstituteSettings(4, "minmax")
    inputs = related_inputs()
    inputs[3, 7] = torch.inf
    made = quantize_layer(tensors, settings, measured(inputs, related_inputs()))
    assert made.quality["down"].outputs is None
    for name, tensor in quantize_layer(tensors, settings).tensors.items():
        assert made.tensors[name].equal(tensor)


def test_a_feature_that_no_text_uses_is_rounded_all_the_same():
    inputs = related_inputs()
    inputs[:, 5] = 0
    inputs[:, 128:] = 0
    found = ErrorFeedback(moments_of(inputs)).round(weight(), 4, GROUP)
    scale, zero = (part.repeat_interleave(GROUP, 1) for part in found.grid.kernel_pairs(4))
    restored = (found.codes.float() - 8) * scale + zero
    assert (restored - weight().float())[:, 128:].abs().max() < 0.01


def test_every_matrix_is_measured_with_what_it_multiplies(tiny, monkeypatch):
    model = tiny("llama", layers=2)
    target = model.target()
    seen = {}
    real = type(target)._project

    def project(self, block, name, inputs):
        seen.setdefault((block.layer, name), []).append(inputs.clone())
        return real(self, block, name, inputs)

    monkeypatch.setattr(type(target), "_project", project)
    monkeypatch.setattr("subspec_cli.decoding.row_groups.PREFILL_CHUNK", 32)
    measuring = MeasuringTarget(*parts_of(target))
    kv = model.kv()
    batches = [[SequenceRows(group, kv)] for group in prompt_groups(list(range(40, 86)), 0)]
    found = dict(measuring.measured(measuring.begin(batches)))
    assert sorted(found) == list(range(target.layer_count))
    assert {(layer, measured_name(name)) for layer, name in seen} == {
        (layer, name) for layer, items in found.items() for name in items
    }
    for (layer, name), (first, second) in seen.items():
        item = found[layer][measured_name(name)]
        for moments, inputs, count in ((item.fit, first, 32), (item.check, second, 14)):
            rows = inputs[:count].float()
            assert moments.rows == count
            torch.testing.assert_close(moments.sums[0], (rows.T @ rows)[:128, :128], rtol=1e-4, atol=1e-4)


def parts_of(target):
    return target.math, target.attention, target._embed, target._head, target._stream, target.rules
