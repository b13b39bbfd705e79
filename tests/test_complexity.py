"""complexity.py: the record that it writes, the options that it takes, and what is refused."""

import csv
import json
import subprocess
import sys

import onnx
import pytest
import torch
import transformers
from conftest import MINILM, ROOT, run, run_here, succeed
from test_layers import TINY

import complexity
from core.checkpoint import packaged_folder
from core.files import write_json
from core.repository import read_card
from core.tables import PRECISIONS, SERVED
from precision import int8_graph
from reporting.complexity import measured_latency
from roofline import model as roofline
from roofline import times
from roofline.gpus import read_hardware

LENGTH = 32


def save_checkpoint(folder, config):
    """A tiny checkpoint with seeded weights and MiniLM's tokenizer."""
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(packaged_folder()).save_pretrained(folder)
    return folder


def count(folder, *options):
    """complexity.json of a model, counted into folder."""
    options += ("--results", folder / "results", "--repository", folder / "model_repository")
    done = run_here(complexity, *options)
    assert done.returncode == 0, done.stderr
    (path,) = folder.rglob("complexity.json")
    return json.loads(path.read_text()), path


@pytest.fixture(scope="module")
def tiny_options(tmp_path_factory):
    config = transformers.BertConfig(**TINY | {"vocab_size": 30522})
    folder = save_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint", config)
    return "--model", folder, "--max-length", LENGTH


@pytest.fixture(scope="module")
def distilbert(tmp_path_factory):
    """complexity.json of DistilBERT's architecture on a T4."""
    return count(tmp_path_factory.mktemp("distilbert"), "--random-weights", "--gpu", "t4")[0]


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """complexity.json of MiniLM on a T4, and its path."""
    return count(tmp_path_factory.mktemp("minilm"), "--model", MINILM, "--gpu", "T4")


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


def test_fused_attention_has_length_over_bytes_and_is_never_slower(distilbert):
    kinds = [k | {"name": k["example"]} for k in distilbert["kinds"]]
    (attention,) = (g for g in roofline.fuse(kinds, 1, 128) if g[0]["kind"] == "QKᵀ")
    matmuls = sum(roofline.cost(layer, 8, 128).flops for layer in attention if roofline.is_matmul(layer))
    assert matmuls / roofline.fused_bytes(attention, 8, 128, "FP16") == 128 / 2
    for precision in SERVED:
        for found in distilbert["least_latency_s"][precision].values():
            assert found["fused"] < found["apart"]
    assert distilbert["least_latency_s"]["TF32"]["1"]["apart"] is None  # a T4 has none


def test_int8_and_best_are_two_rows_everywhere(minilm):
    record, path = minilm
    totals, least = record["totals"], record["least_latency_s"]
    for rows in (totals["weight_bytes"], least, record["kinds"][0]["precisions"]):
        assert list(rows) == list(PRECISIONS)
    linears = {k["name"]: k["shape"]["inputs"] * k["shape"]["outputs"] for k in record["layers"] if k["op"] == "linear"}
    quantized = sum(linears.values())
    for precision, size in (("INT8", 4), ("BEST", 2)):
        assert totals["weight_bytes"][precision] == quantized + size * (totals["parameters"] - quantized)
    # with FP32 around its Linears, INT8 cannot be as fast as FP16 at batch 8; BEST can be faster
    assert least["BEST"]["8"]["apart"] < least["FP16"]["8"]["apart"] < least["INT8"]["8"]["apart"]
    with open(path.with_name("complexity.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == [layer["name"] for layer in record["layers"]]
    assert sum(int(row["flops"]) for row in rows) == totals["flops"]
    assert [c for c in rows[0] if c.startswith("bytes")] == [f"bytes_{p}" for p in SERVED]
    assert all(float(r["intensity_BEST"]) == pytest.approx(int(r["flops"]) / int(r["bytes_BEST"]), 1e-3) for r in rows)


def test_the_export_counts_too_and_the_graph_has_the_same_linears(exported, minilm):
    (path,) = exported.results.rglob("complexity.json")
    record, card = json.loads(path.read_text()), read_card(exported.repository)
    assert record["model"]["reference_sha256"] == card["reference_sha256"]
    # one model, one number: nowhere is the pooler counted, which no graph has
    assert record["totals"]["parameters"] == card["parameters"] == minilm[0]["totals"]["parameters"]
    assert record["layers"] == minilm[0]["layers"]
    graph = onnx.load(exported.repository / "model_ONNX/1/model.onnx")
    linears = [layer for layer in record["layers"] if layer["op"] == "linear"]
    assert len(int8_graph.weight_matmuls(graph)) == len(linears)


def test_a_count_belongs_to_the_export_of_the_same_model_only(tiny_options, tmp_path):
    card = count(tmp_path, *tiny_options)[0]["model"]
    assert "reference_sha256" not in card
    export = card | {"task": "embedding", "reference_sha256": "0123", "environment": {}}
    write_json(tmp_path / "assets/model.json", export)
    assert count(tmp_path, *tiny_options)[0]["model"] == {k: v for k, v in export.items() if k != "environment"}
    assert "reference_sha256" not in count(tmp_path, *tiny_options[:2], "--max-length", 16)[0]["model"]


# --- options -------------------------------------------------------------------------


def test_help_and_the_list_of_gpus_do_not_wait_for_torch():
    code = (
        "import sys, complexity; sys.argv[1:] = ['--list-gpus']; complexity.main(); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "T4 " in done.stdout, done.stderr
    assert "--peak-tflops" in succeed("complexity.py", "-h").stdout


def test_an_unknown_gpu_is_refused_with_near_names(tmp_path):
    done = run("complexity.py", "--model", MINILM, "--gpu", "A1000", "--results", tmp_path)
    assert done.returncode == 1 and "A10" in done.stderr and "--list-gpus" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_a_gpu_of_ones_own(tiny_options, tmp_path):
    own = ("--peak-tflops", "FP32=10", "FP16=100", "--bandwidth-gb-s", 1000)
    record, _ = count(tmp_path, *tiny_options, *own)
    assert record["gpu"]["ridge_points"] == {"FP32": 10.0, "FP16": 100.0} | dict.fromkeys(
        ("TF32", "BF16", "INT8", "FP8")
    )
    assert record["least_latency_s"]["BEST"]["1"]["apart"] is None
    for words in (("-1", "--bandwidth-gb-s", "5"), ("nan", "--bandwidth-gb-s", "5"), ("5", "--bandwidth-gb-s", "0")):
        done = run_here(complexity, "--peak-tflops", *words)
        assert done.returncode == 1 and "expected a number above 0" in done.stderr
    assert run_here(complexity, "--peak-tflops", "5").returncode == 2


def test_an_unknown_layer_is_named_and_no_total_is_written(tmp_path):
    sizes = {"vocab_size": 30522, "hidden_size": 64, "num_attention_heads": 4}
    folder = save_checkpoint(tmp_path / "c", transformers.ConvBertConfig(**TINY | sizes))
    options = ("--max-length", LENGTH, "--results", tmp_path, "--repository", tmp_path / "model_repository")
    done = run_here(complexity, "--model", folder, *options)
    assert done.returncode == 1 and "Conv1d" in done.stderr and "no total" in done.stderr, done.stderr
    assert not list(tmp_path.rglob("complexity.json"))


def test_a_length_beyond_the_positions_is_refused(tmp_path):
    done = run_here(complexity, "--model", MINILM, "--max-length", 513, "--results", tmp_path)
    assert done.returncode == 1 and "512" in done.stderr and "Traceback" not in done.stderr


# --- measured ------------------------------------------------------------------------


def test_layers_are_timed_and_an_earlier_measurement_is_kept(tiny_options, tmp_path):
    record, _ = count(tmp_path, *tiny_options, "--measure", "--layer-time-s", 0.002)
    measured = record["measured"]
    assert len(measured["layers"]) == 2 * len(record["kinds"])
    for row in measured["layers"]:
        assert min(row[k] for k in ("warm_s", "memory_s", "move_s")) > 0
        assert row["cold_s"] is None or row["cold_s"] > 0
        assert row["agree"] == (row["predicted"] == row["measured"])
    for row in measured["models"]:
        rows = [r for r in measured["layers"] if r["batch"] == row["batch"]]
        assert row["sum_of_layers_s"] == pytest.approx(sum(r["calls"] * (r["cold_s"] or r["warm_s"]) for r in rows))
    assert count(tmp_path, *tiny_options)[0]["measured"] == measured


@pytest.mark.parametrize(
    "found, bound",
    [
        ({"memory_s": 10, "move_s": 6, "overhead_s": 1}, "memory"),
        ({"memory_s": 10, "move_s": 4, "overhead_s": 1}, "arithmetic"),
        ({"memory_s": 10, "move_s": 6, "overhead_s": 6}, "call overhead"),
    ],
)
def test_the_measured_bound_is_what_explains_half_of_the_time(found, bound):
    assert times.bound_of(found) == bound


def test_a_gemm_is_measured_bound_by_arithmetic_and_an_add_by_memory():
    gemm = {"name": "x", "kind": "FFN 1", "op": "linear", "shape": {"inputs": 1024, "outputs": 1024}, "calls": 1}
    add = {"name": "x", "kind": "residual add", "op": "add", "shape": {"width": 3072}, "calls": 1}
    for layer, bound in ((gemm, "arithmetic"), (add, "memory")):
        with torch.inference_mode():  # on a busy machine a measurement may fail, but not all of them
            found = (times.bound_of(times.measure_layer(layer, 8, 128, "cpu", 0.1)) for _ in range(5))
            assert bound in found, layer


def test_a_speed_of_a_cpu_never_stands_beside_a_gpus_least_latency():
    row = {"model": "TRT_FP16", "concurrency": 1, "latency_p50_ms": 2.0}
    perf = {"rows": [row], "settings": {"batch_size": 1}, "environment": {"gpu": {"name": "Tesla T4"}}}
    gpus = read_hardware()
    cpu = {"server": {"engines": {"ONNX": "ONNX Runtime, CPU", "TRT_FP16": "ONNX Runtime, CPU"}}}
    device = {"server": {"engines": {"ONNX": "ONNX Runtime, GPU", "TRT_FP16": "TensorRT, GPU"}}}
    assert measured_latency(perf | cpu, gpus["T4"], "FP16", "1") == "not measured"
    assert measured_latency(perf | device, gpus["T4"], "FP16", "1") == "2000"
    assert measured_latency(perf | device, gpus["T4"], "FP16", "8") == "not measured"
    for name, other in (("Tesla T4", "L4"), ("NVIDIA L40S", "L4"), ("NVIDIA A100-SXM4-80GB", "A10")):
        perf["environment"]["gpu"]["name"] = name
        assert measured_latency(perf | device, gpus[other], "FP16", "1") == "not measured"
