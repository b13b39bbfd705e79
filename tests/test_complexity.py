"""complexity.py: three counts that agree, thresholds that brute force confirms, and what is refused."""

import json
import math

import onnx
import pytest
import torch
import transformers
from conftest import MINILM, run, succeed
from hypothesis import given, settings
from hypothesis import strategies as st
from test_torch2onnx import TINY, save_checkpoint

import complexity
from precision import int8_graph
from roofline import model as roofline
from roofline import times
from roofline.layers import (
    UnknownLayer,
    by_kind,
    compare_counts,
    count_closed_form,
    count_fvcore,
    count_torch,
    list_layers,
)
from torch2onnx import Embedder

LENGTH = 32


def linear(inputs, outputs):
    return {"name": "x", "kind": "FFN 1", "op": "linear", "shape": {"inputs": inputs, "outputs": outputs}, "calls": 1}


def embed(config, attention="eager"):
    transformer = transformers.AutoModel.from_config(config, attn_implementation=attention).eval()
    if getattr(transformer, "pooler", None) is not None:
        transformer.pooler = None
    return Embedder(transformer, 2, 0).eval()


@pytest.fixture(scope="module")
def distilbert(tmp_path_factory):
    """complexity.json of DistilBERT's architecture on a T4."""
    folder = tmp_path_factory.mktemp("distilbert")
    succeed("complexity.py", "--random-weights", "--gpu", "t4", "--results", folder, "--assets", folder)
    return json.loads((folder / "distilbert-base-uncased-random/complexity.json").read_text())


def test_distilberts_matmul_flops_derive_by_hand(distilbert):
    tokens, width, ffn, layers = 128, 768, 3072, 6  # batch 1, length 128
    projections = 4 * 2 * tokens * width * width  # Q, K, V, output
    attention = 2 * 2 * tokens * tokens * width  # QKᵀ and AV over all heads
    feed_forward = 2 * 2 * tokens * width * ffn
    matmuls = layers * (projections + attention + feed_forward) + 2 * tokens * width * 2  # and the head
    assert matmuls == 11_174_019_072
    counts = distilbert["counts"]
    assert counts["closed_form_flops"] == counts["torch_flops"] == 2 * counts["fvcore_macs"] == matmuls
    norms = (2 * layers + 1) * 5 * tokens * width
    assert counts["fvcore_layer_norm"] == norms and counts["fvcore_raw"] == matmuls // 2 + norms
    assert distilbert["totals"]["parameters"] == 66_362_880 + 768 * 2 + 2  # DistilBertModel and the head


def test_elementwise_layers_derive_by_hand_too(distilbert):
    flops = {kind["kind"]: kind["flops"] for kind in distilbert["kinds"]}
    assert flops["softmax"] == 6 * 5 * 12 * 128 * 128 and flops["GELU"] == 6 * 8 * 128 * 3072
    assert flops["LayerNorm"] == 12 * 5 * 128 * 768 and flops["residual add"] == 12 * 128 * 768
    assert sum(flops.values()) == distilbert["totals"]["flops"]
    assert flops["embedding gather"] == 0


def test_the_export_counts_too_and_the_graph_has_the_same_linears(exported):
    record = json.loads((exported.results / "all-MiniLM-L6-v2/complexity.json").read_text())
    card = json.loads((exported.assets / "model.json").read_text())
    assert record["model"]["reference_sha256"] == card["reference_sha256"]
    graph = onnx.load(exported.repository / "model_ONNX/1/model.onnx")
    linears = [layer for layer in record["layers"] if layer["op"] == "linear"]
    assert len(int8_graph.weight_matmuls(graph)) == len(linears)


@pytest.mark.parametrize(
    "config",
    [
        transformers.BertConfig(**TINY),
        transformers.RobertaConfig(**TINY, max_position_embeddings=514),
        transformers.MPNetConfig(**TINY, max_position_embeddings=514),
        transformers.AlbertConfig(**TINY, embedding_size=16),
        transformers.ElectraConfig(**TINY, embedding_size=16),
        transformers.DistilBertConfig(vocab_size=30522, dim=32, n_layers=2, n_heads=2, hidden_dim=64),
    ],
    ids=lambda config: config.model_type,
)
def test_three_counts_agree_in_every_module_of_other_encoders(config):
    embedder = embed(config)
    layers = list_layers(embedder, LENGTH)
    closed, fvcore, torch_flops = (
        count_closed_form(layers, LENGTH),
        count_fvcore(embedder, LENGTH),
        count_torch(embedder, LENGTH),
    )
    compare_counts(closed, fvcore, torch_flops)
    assert sum(closed.values()) == 2 * fvcore["macs"] == torch_flops["flops"] > 0


def test_attention_that_fvcore_does_not_see_is_an_error():
    with pytest.raises(UnknownLayer, match="scaled_dot_product_attention"):
        count_fvcore(embed(transformers.BertConfig(**TINY), attention="sdpa"), LENGTH)


def test_a_matmul_outside_the_closed_form_is_named():
    class Self(transformers.models.bert.modeling_bert.BertSelfAttention):
        def forward(self, hidden, *args, **options):
            output, weights = super().forward(hidden, *args, **options)
            return output + hidden @ hidden.transpose(1, 2) @ hidden, weights

    embedder = embed(transformers.BertConfig(**TINY))
    embedder.transformer.encoder.layer[1].attention.self.__class__ = Self
    closed = count_closed_form(list_layers(embedder, LENGTH), LENGTH)
    with pytest.raises(UnknownLayer, match=r"encoder.layer.1.attention.self: .* finds [\d,]+ matmul FLOPs"):
        compare_counts(closed, count_fvcore(embedder, LENGTH), count_torch(embedder, LENGTH))


def test_what_no_matmul_shows_is_named_too():
    with pytest.raises(SystemExit, match="found .*RoFormerSinusoidalPositionalEmbedding"):
        complexity.count_flops(embed(transformers.RoFormerConfig(**TINY)), LENGTH)
    embedder = embed(transformers.BertConfig(**TINY))
    layer = embedder.transformer.encoder.layer[1].intermediate
    del layer.intermediate_act_fn
    layer.intermediate_act_fn = torch.nn.functional.gelu  # a plain function is no module
    with pytest.raises(SystemExit, match="found aten::gelu, called 2 times; the closed form has it 1 times"):
        complexity.count_flops(embedder, LENGTH)


def test_an_unknown_layer_is_named_and_no_total_is_written(tmp_path):
    config = transformers.ConvBertConfig(**TINY | {"hidden_size": 64, "num_attention_heads": 4})
    folder = save_checkpoint(tmp_path / "c", config)
    options = ("--results", tmp_path / "results", "--assets", tmp_path)
    done = run("complexity.py", "--model", folder, "--max-length", LENGTH, *options)
    assert done.returncode == 1 and "Conv1d" in done.stderr and "no total" in done.stderr, done.stderr
    assert not list(tmp_path.rglob("complexity.json"))


# --- intensity and thresholds --------------------------------------------------------


def test_intensity_is_that_of_nvidias_published_example():
    # GPU Performance Background: Linear with 4096 outputs, 1024 inputs, FP16: batch 512 -> 315, batch 1 -> 1
    layer = linear(1024, 4096)
    assert round(roofline.intensity(layer, 512, 1, "FP16")) == 315
    assert round(roofline.intensity(layer, 1, 1, "FP16")) == 1


def test_attention_products_have_the_same_intensity_at_every_batch():
    layer = {"name": "x", "kind": "QKᵀ", "op": "scores", "shape": {"width": 768, "heads": 12}, "calls": 1}
    found = {roofline.intensity(layer, b, 128, "FP16") for b in (1, 8, 1000)}
    assert found == {2 * 128 * 64 / (2 * (2 * 64 + 128))}
    assert roofline.threshold(layer, 128, "FP16", 65e12, 320e9)["verdict"] == "never"
    assert roofline.threshold(layer, 128, "FP16", 10e12, 320e9)["verdict"] == "always"


@settings(deadline=None, max_examples=300)
@given(
    inputs=st.integers(1, 4096),
    outputs=st.integers(1, 4096),
    length=st.sampled_from([1, 16, 128, 512]),
    precision=st.sampled_from(list(roofline.PRECISIONS)),
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
        assert bound_by_arithmetic(found["batch"]) and not (
            found["batch"] > 1 and bound_by_arithmetic(found["batch"] - 1)
        )


def test_a_batch_exactly_on_the_ridge_counts():
    # Linear 1024 -> 1024 in FP16 at 512 tokens: 2·512·1024² FLOPs over 2·1024·2048 bytes, exactly 256
    found = roofline.threshold(linear(1024, 1024), 512, "FP16", 256e12, 1e12)
    assert roofline.intensity(linear(1024, 1024), 1, 512, "FP16") == 256
    assert (found["batch_real"], found["batch"]) == (1.0, 1)


def test_the_head_is_bound_by_memory_on_every_gpu(distilbert):
    head = linear(768, 2)
    for gpu in roofline.read_hardware().values():
        for precision, peak in gpu["peak_flops"].items():
            if peak:
                assert roofline.threshold(head, 128, precision, peak, gpu["bandwidth"])["verdict"] == "never"


def test_fused_attention_has_length_over_bytes_and_is_never_slower(distilbert):
    kinds = [k | {"name": k["example"]} for k in distilbert["kinds"]]
    (attention,) = (g for g in roofline.fuse(kinds, 1, 128) if g[0]["kind"] == "QKᵀ")
    assert roofline.fused_intensity(attention, 8, 128, "FP16") == 128 / 2
    for precision in ("FP32", "FP16", "INT8"):
        for found in distilbert["least_latency_s"][precision].values():
            assert found["fused"] < found["apart"]
    assert distilbert["least_latency_s"]["TF32"]["1"]["apart"] is None  # a T4 has none


# --- hardware ------------------------------------------------------------------------


def test_peaks_of_the_hardware_table_are_dense_and_ordered():
    for gpu in roofline.read_hardware().values():
        p = gpu["peak_flops"]
        assert p["FP16"] < p["INT8"] <= 4 * p["FP16"] + 1e12, gpu["name"]
        assert p["TF32"] is None or p["TF32"] <= p["FP16"], gpu["name"]
        assert gpu["source"]


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
    monkeypatch.setattr(roofline, "gpu_record", lambda: {"name": reported})
    assert roofline.find_gpu(None, roofline.read_hardware())["name"] == name


def test_an_unknown_gpu_is_refused_with_near_names(tmp_path):
    done = run("complexity.py", "--model", MINILM, "--gpu", "A1000", "--results", tmp_path)
    assert (
        done.returncode == 1
        and "A10" in done.stderr
        and "--list-gpus" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert not list(tmp_path.iterdir())
    assert "T4 " in succeed("complexity.py", "--list-gpus").stdout


def test_a_gpu_of_ones_own(tmp_path):
    folder = save_checkpoint(tmp_path / "c", transformers.BertConfig(**TINY))
    options = ("--model", folder, "--max-length", LENGTH, "--results", tmp_path / "r", "--assets", tmp_path)
    succeed("complexity.py", *options, "--peak-tflops", "FP32=10", "FP16=100", "--bandwidth-gb-s", 1000)
    (path,) = (tmp_path / "r").rglob("complexity.json")
    gpu = json.loads(path.read_text())["gpu"]
    assert gpu["ridge_points"] == {"FP32": 10.0, "TF32": None, "FP16": 100.0, "INT8": None}
    for words in (("-1", "--bandwidth-gb-s", "5"), ("nan", "--bandwidth-gb-s", "5"), ("5", "--bandwidth-gb-s", "0")):
        done = run("complexity.py", *options, "--peak-tflops", *words)
        assert done.returncode == 1 and "expected a number above 0" in done.stderr
    assert run("complexity.py", *options, "--peak-tflops", "5").returncode == 2


def test_a_length_beyond_the_positions_is_refused(tmp_path):
    done = run("complexity.py", "--model", MINILM, "--max-length", 513, "--results", tmp_path)
    assert done.returncode == 1 and "512" in done.stderr and "Traceback" not in done.stderr


# --- measured ------------------------------------------------------------------------


def test_layers_are_timed_and_an_earlier_measurement_is_kept(tmp_path):
    folder = save_checkpoint(tmp_path / "c", transformers.BertConfig(**TINY))
    options = ("--model", folder, "--max-length", LENGTH, "--results", tmp_path / "r", "--assets", tmp_path)
    succeed("complexity.py", *options, "--measure", "--layer-time-s", 0.002)
    (path,) = (tmp_path / "r").rglob("complexity.json")
    measured = json.loads(path.read_text())["measured"]
    kinds = json.loads(path.read_text())["kinds"]
    assert len(measured["layers"]) == 2 * len(kinds)
    for row in measured["layers"]:
        assert min(row[k] for k in ("warm_s", "memory_s", "move_s")) > 0 and (
            row["cold_s"] is None or row["cold_s"] > 0
        )
        assert row["agree"] == (row["predicted"] == row["measured"])
    for row in measured["models"]:
        rows = [r for r in measured["layers"] if r["batch"] == row["batch"]]
        assert row["sum_of_layers_s"] == pytest.approx(sum(r["calls"] * (r["cold_s"] or r["warm_s"]) for r in rows))
    succeed("complexity.py", *options)
    assert json.loads(path.read_text())["measured"] == measured


@pytest.mark.parametrize(
    "times, bound",
    [
        ({"memory_s": 10, "move_s": 6, "overhead_s": 1}, "memory"),
        ({"memory_s": 10, "move_s": 4, "overhead_s": 1}, "arithmetic"),
        ({"memory_s": 10, "move_s": 6, "overhead_s": 6}, "call overhead"),
    ],
)
def test_the_measured_bound_is_what_explains_half_of_the_time(times, bound):
    assert times.bound_of(times) == bound


def test_a_gemm_is_measured_bound_by_arithmetic_and_an_add_by_memory():
    gemm = linear(1024, 1024)
    add = {"name": "x", "kind": "residual add", "op": "add", "shape": {"width": 3072}, "calls": 1}
    with torch.inference_mode():
        found = [times.bound_of(times.measure_layer(x, 8, 128, "cpu", 0.1)) for x in (gemm, add)]
    assert found == ["arithmetic", "memory"]


def test_a_speed_of_a_cpu_never_stands_beside_a_gpus_least_latency():
    row = {"model": "TRT_FP16", "concurrency": 1, "latency_p50_ms": 2.0}
    perf = {"rows": [row], "settings": {"batch_size": 1}, "environment": {"gpu": {"name": "Tesla T4"}}}
    gpu = roofline.read_hardware()["T4"]
    cpu = {"server": {"engines": {"ONNX": "ONNX Runtime, CPU", "TRT_FP16": "ONNX Runtime, CPU"}}}
    device = {"server": {"engines": {"ONNX": "ONNX Runtime, GPU", "TRT_FP16": "TensorRT, GPU"}}}
    assert complexity.measured_latency(perf | cpu, gpu, "FP16", "1") == "not measured"
    assert complexity.measured_latency(perf | device, gpu, "FP16", "1") == "2000"
    assert complexity.measured_latency(perf | device, gpu, "FP16", "8") == "not measured"
    gpus = roofline.read_hardware()
    for name, other in (("Tesla T4", "L4"), ("NVIDIA L40S", "L4"), ("NVIDIA A100-SXM4-80GB", "A10")):
        perf["environment"]["gpu"]["name"] = name
        assert complexity.measured_latency(perf | device, gpus[other], "FP16", "1") == "not measured"


def test_kinds_add_up_to_the_layers():
    layers = list_layers(embed(transformers.AlbertConfig(**TINY, embedding_size=16)), LENGTH)

    def total(rows):
        return sum(r["calls"] * roofline.cost(r, 1, LENGTH).flops for r in rows)

    assert total(by_kind(layers)) == total(layers)
