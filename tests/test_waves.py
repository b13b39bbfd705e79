"""Beyond the ridge: fused thresholds, tiles and waves, the batch that fills a GPU; and what torch measures on a device."""

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import run_here
from hypothesis import given, settings
from hypothesis import strategies as st
from test_complexity import count, tiny_options  # noqa: F401
from test_roofline import linear

import complexity
from reporting import thresholds
from roofline import arithmetic, times, waves
from roofline import model as roofline
from roofline.gpus import read_hardware

T4 = read_hardware()["T4"]


def layer(kind, op, **shape):
    return {"name": kind, "kind": kind, "op": op, "shape": shape, "calls": 6}


ATTENTION = [
    layer("QKᵀ", "scores", width=768, heads=12),
    layer("softmax", "softmax", heads=12),
    layer("AV", "context", width=768, heads=12),
]
FFN = [layer("FFN 1", "linear", inputs=768, outputs=3072)]
FUSED = [*FFN, layer("GELU", "activation", width=3072, flops_per_element=8)]


def test_a_full_wave_uses_all_sms_and_one_tile_more_takes_twice_as_long():
    wide = linear(768, 128 * 40)  # 40 tiles across, as many as a T4 has SMs
    assert waves.occupied(wide, 1, 128, 40) == 1
    assert waves.occupied(wide, 2, 128, 40) == 1
    assert waves.occupied(linear(768, 128 * 41), 1, 128, 40) == pytest.approx(41 / 80)
    assert waves.occupied(wide, 1, 129, 40) == pytest.approx(129 / 256)  # a second row of tiles for one token
    assert waves.occupied(linear(768, 768), 1, 128, 40) == 6 / 40
    assert waves.occupied(ATTENTION[0], 2, 128, 40) == 24 / 40  # a tile for each head and text
    assert waves.occupied(ATTENTION[0], 2, 128, None) == 1


@settings(deadline=None, max_examples=200)
@given(
    inputs=st.integers(1, 4096),
    outputs=st.integers(1, 4096),
    length=st.sampled_from([1, 16, 128, 512]),
    gpu=st.sampled_from(list(read_hardware().values())),
)
def test_a_lone_linear_has_the_threshold_that_was_solved_in_rational_numbers(inputs, outputs, length, gpu):
    solved = roofline.threshold(linear(inputs, outputs), length, "FP16", gpu["peak_flops"]["FP16"], gpu["bandwidth"])
    found = waves.group_threshold([linear(inputs, outputs)], length, "FP16", gpu)
    assert found["verdict"] == solved["verdict"] and found["unit"] == "tensor cores"
    if solved["batch_real"] and solved["batch_real"] < 1e5:  # beyond, the denominator is a difference of floats
        assert found["batch_real"] == pytest.approx(solved["batch_real"], rel=1e-4)
        assert abs(found["tokens"] - solved["batch_real"] * length) <= 1 + 1e-4 * found["tokens"]


def test_fusion_lowers_thresholds_and_bounds_attention_by_its_length():
    alone = [waves.group_threshold(group, 128, "FP16", T4)["batch_real"] for group in (FFN, FUSED)]
    assert alone[1] <= alone[0]
    # 4L²D FLOPs over 4LD elements of 2 bytes: L / 2 is the ridge point
    ridge = Fraction(65_000, 320)
    assert waves.length_threshold(ATTENTION, "FP16", T4) == int(2 * ridge) + 1
    assert waves.group_threshold(ATTENTION, 128, "FP16", T4)["verdict"] == "never"
    assert waves.group_threshold(ATTENTION, 512, "FP16", T4)["verdict"] == "always"


def test_the_batch_that_reaches_the_roof_is_the_one_that_brute_force_finds():
    found = waves.batch_reaching([FFN], 128, "FP16", T4)
    shares = [float(waves.reached([FFN], batch, 128, "FP16", T4)) for batch in range(1, 1025)]
    assert min(shares[found - 1 :]) >= waves.ROOF_SHARE > shares[found - 2]
    assert found > waves.group_threshold(FFN, 128, "FP16", T4)["batch"]  # necessary, not sufficient
    assert waves.batch_reaching([[linear(768, 2)]], 128, "FP16", T4) is None
    assert waves.first_from(np.array([True, False, True]), [1, 2, 3]) == 3
    assert waves.first_from(np.array([True, False]), [1, 2]) is None


# --- the record ----------------------------------------------------------------------


def test_the_record_has_groups_every_gpu_and_a_surface(tiny_options, tmp_path):  # noqa: F811
    record, path = count(tmp_path, *tiny_options, "--gpu", "L4", "--precisions", "FP8", "BF16")
    groups = {row["group"]: row["precisions"] for row in record["groups"]}
    assert {"QKᵀ + softmax + AV", "FFN 1 + GELU"} <= groups.keys() and "FP8" in groups["FFN 1 + GELU"]
    assert set(record["roof_batches"]) == set(read_hardware()) and "FP8" not in record["roof_batches"]["T4"]
    surface = json.loads(path.with_name("surface.json").read_text())
    share = np.array(surface["share"]["FP8"])
    assert share.shape == (len(waves.BATCHES), len(waves.LENGTHS)) and 0 < share.min() <= share.max() <= 1
    text = "\n".join(thresholds.predicted(record))
    assert "necessary, not sufficient" in text and "surface.png" in text and "H100 SXM" in text
    assert thresholds.predicted({}) == []
    assert thresholds.measured({"complexity": record}) == ["A GPU: not measured."]


def test_a_precision_that_the_gpu_lacks_is_refused_with_those_that_have_it():
    done = run_here(complexity, "--gpu", "T4", "--precisions", "FP8")
    assert done.returncode == 1 and "--precisions FP8: expected a GPU that has it, found T4" in done.stderr
    assert "H100 SXM" in done.stderr and "A100" not in done.stderr


# --- measured ------------------------------------------------------------------------


def test_a_device_is_measured_precision_by_precision(tiny_options, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(arithmetic, "BATCHES", (1, 2))
    monkeypatch.setattr(times, "TRIAD_ELEMENTS", 1 << 22)
    monkeypatch.setitem(arithmetic.GEMM_SIZE, "cpu", 256)
    options = ("--measure", "--device", "cpu", "--layer-time-s", 0.001)
    record, _ = count(tmp_path, *tiny_options, *options)
    found = record["measured"]
    assert set(found["roofs"]["peak_flops"]) == {"FP32", "FP16", "BF16"} and found["roofs"]["bandwidth"] > 0
    kinds = {k["kind"] for k in record["kinds"] if k["op"] == "linear"} - {"head"}
    assert {(r["kind"], r["precision"]) for r in found["thresholds"]} == {
        (kind, p) for kind in kinds for p in found["roofs"]["peak_flops"]
    }
    errors = {p: row["relative_l2_error"] for p, row in found["deviations"].items()}
    assert 0 < errors["FP16"] < errors["BF16"] < 0.1
    text = "\n".join(thresholds.measured({"complexity": record}))
    assert text.startswith("A GPU: not measured.") and "a copy moves" in text and "| BF16 |" in text
    assert torch.get_default_dtype() == torch.float32


def test_a_gpu_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cuda: expected a GPU that torch can use, found none"):
        times.measure_layers(None, [], 128, 0.1, "cuda")
    assert run_here(complexity, "--device", "cuda").returncode == 2


@pytest.mark.parametrize(
    "predicted, found, same",
    [
        (4, 8, True),
        (3, 8, False),
        (None, None, True),
        (500, None, True),
        (64, None, False),
        (None, 128, True),
        (2, 128, False),
    ],
)
def test_a_predicted_and_a_measured_batch_agree_within_a_factor_of_two(predicted, found, same):
    assert arithmetic.agree(predicted, found, arithmetic.BATCHES) is same
