"""The roofline model: thresholds that brute force confirms, bytes of each precision, the table of GPUs."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.tables import PRECISIONS
from roofline import gpus
from roofline import model as roofline
from roofline.gpus import find_gpu, read_hardware


def linear(inputs, outputs, **shape):
    return {
        "name": "x",
        "kind": "x",
        "op": "linear",
        "shape": {"inputs": inputs, "outputs": outputs, **shape},
        "calls": 1,
    }


SCORES = {"name": "x", "kind": "QKᵀ", "op": "scores", "shape": {"width": 768, "heads": 12}, "calls": 1}
ADD = {"name": "x", "kind": "residual add", "op": "add", "shape": {"width": 768}, "calls": 1}


def test_intensity_is_that_of_nvidias_published_example():
    # GPU Performance Background: Linear with 4096 outputs, 1024 inputs, FP16: batch 512 -> 315, batch 1 -> 1
    layer = linear(1024, 4096)
    assert round(roofline.intensity(layer, 512, 1, "FP16")) == 315
    assert round(roofline.intensity(layer, 1, 1, "FP16")) == 1


def test_int8_has_fp32_around_its_linears_and_best_has_fp16():
    tokens, k, n = 128, 768, 3072
    for precision, size in (("INT8", 4), ("BEST", 2)):
        moved = roofline.bytes_moved(linear(k, n), 1, tokens, precision)
        assert moved == tokens * k + k * n + size * tokens * n
        assert roofline.bytes_moved(ADD, 1, tokens, precision) == 3 * size * tokens * 768
    t4 = read_hardware()["T4"]
    peaks = {p: [roofline.peak_flops(t4, x, p) / 1e12 for x in (linear(k, n), SCORES, ADD)] for p in ("INT8", "BEST")}
    assert peaks == {"INT8": [130, 8.1, 8.1], "BEST": [130, 65, 8.1]}


def test_attention_products_have_the_same_intensity_at_every_batch():
    found = {roofline.intensity(SCORES, b, 128, "FP16") for b in (1, 8, 1000)}
    assert found == {2 * 128 * 64 / (2 * (2 * 64 + 128))}
    assert roofline.threshold(SCORES, 128, "FP16", 65e12, 320e9)["verdict"] == "never"
    assert roofline.threshold(SCORES, 128, "FP16", 10e12, 320e9)["verdict"] == "always"


def test_a_linear_on_a_table_has_no_threshold_batch():
    layer = linear(768, 768, rows=512)  # DeBERTa's positions, which a batch shares
    assert roofline.threshold(linear(768, 768), 128, "FP16", 30e12, 320e9)["verdict"] == "from"
    for peak, verdict in ((30e12, "always"), (100e12, "never")):
        found = roofline.threshold(layer, 128, "FP16", peak, 320e9)
        assert found["verdict"] == verdict and found["batch"] is None
        assert found["limiting_intensity"] == roofline.intensity(layer, 8, 128, "FP16")


@settings(deadline=None, max_examples=300)
@given(
    inputs=st.integers(1, 4096),
    outputs=st.integers(1, 4096),
    length=st.sampled_from([1, 16, 128, 512]),
    precision=st.sampled_from(list(PRECISIONS)),
    peak=st.integers(1, 4000),
    bandwidth=st.integers(1, 8000),
)
def test_the_solved_threshold_is_the_one_that_brute_force_finds(inputs, outputs, length, precision, peak, bandwidth):
    layer = linear(inputs, outputs)
    found = roofline.threshold(layer, length, precision, peak * 1e12, bandwidth * 1e9)

    def bound_by_arithmetic(batch):  # in integers: FLOPs / bytes >= peak / bandwidth
        c = roofline.cost(layer, batch, length)
        s_x, s_w, s_y = roofline.element_bytes(layer, precision)
        moved = s_x * c.inputs + s_w * c.weights + s_y * c.outputs
        return c.flops * bandwidth * 10**9 >= peak * 10**12 * moved

    smallest = next((b for b in range(1, 2000) if bound_by_arithmetic(b)), None)
    if found["verdict"] == "never":
        assert smallest is None and not bound_by_arithmetic(10**9)
    else:
        assert found["batch"] == smallest or (smallest is None and found["batch"] >= 2000)
        assert math.ceil(found["batch_real"] * (1 - 1e-12)) <= found["batch"]
        assert bound_by_arithmetic(found["batch"])
        assert found["batch"] == 1 or not bound_by_arithmetic(found["batch"] - 1)


def test_a_batch_exactly_on_the_ridge_counts():
    # Linear 1024 -> 1024 in FP16 at 512 tokens: 2·512·1024² FLOPs over 2·1024·2048 bytes, exactly 256
    found = roofline.threshold(linear(1024, 1024), 512, "FP16", 256e12, 1e12)
    assert roofline.intensity(linear(1024, 1024), 1, 512, "FP16") == 256
    assert (found["batch_real"], found["batch"]) == (1.0, 1)


def test_the_head_is_bound_by_memory_on_every_gpu():
    for gpu in read_hardware().values():
        for precision, row in PRECISIONS.items():
            if peak := gpu["peak_flops"][row.peak]:
                assert roofline.threshold(linear(768, 2), 128, precision, peak, gpu["bandwidth"])["verdict"] == "never"


# --- hardware ------------------------------------------------------------------------


def test_peaks_of_the_hardware_table_are_dense_and_ordered():
    for gpu in read_hardware().values():
        p = gpu["peak_flops"]
        assert set(p) == set(gpus.PEAKS) == {"FP32", "TF32", "FP16", "BF16", "INT8", "FP8"}
        assert p["FP16"] < p["INT8"] <= 4 * p["FP16"] + 1e12, gpu["name"]
        assert p["TF32"] is None or p["TF32"] <= p["FP16"], gpu["name"]
        assert p["BF16"] == (p["TF32"] and p["FP16"]), gpu["name"]  # both came with Ampere
        # FP8 came with Ada; GeForce sums it in FP32 at half of the rate of INT8
        assert p["FP8"] in (None, p["INT8"]) or gpu["name"].startswith("RTX") and p["FP8"] >= 1.99 * p["FP16"]
        assert gpu["source"] and 40 <= gpu["sms"] <= 200


@pytest.mark.parametrize(
    "reported, name",
    [
        ("Tesla T4", "T4"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB SXM"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "T4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "T4"),
        ("NVIDIA GeForce GT 710", "T4"),
    ],
)
def test_the_gpu_of_the_machine_is_recognised(reported, name, monkeypatch):
    monkeypatch.setattr(gpus, "gpu_record", lambda: {"name": reported})
    assert find_gpu(None, read_hardware())["name"] == name
