"""compile_check.py: TensorRT's own parser and builder take our graphs and refuse bad ones."""

import json

import onnx
from conftest import run, succeed
from onnx import TensorProto
from test_int8_graph import small_quantized_graph

ARCHITECTURES = ("SM80", "SM86", "SM89", "SM120")


def test_every_graph_compiles_for_every_architecture(exported, tmp_path):
    places = ("--repository", exported.repository, "--results", tmp_path)
    done = succeed("compile_check.py", *places, timeout_s=120)  # two minutes are promised
    (path,) = (tmp_path / "all-MiniLM-L6-v2").glob("*/compile.json")
    record = json.loads(path.read_text())
    assert record["covers"]["not_covered"] == ["SM75", "SM90"] and "RTX" in record["covers"]["builder"]
    assert {(r["graph"], r["architecture"]) for r in record["rows"] if not r["error"]} == {
        (graph, a) for graph in ("ONNX", "TRT_FP32", "TRT_FP16", "TRT_INT8", "TRT_BEST") for a in ARCHITECTURES
    }
    assert done.stdout.count("compiled") == 20


def refuse(tmp_path, graph, word):
    onnx.save(graph, tmp_path / "graph.onnx")
    done = run("compile_check.py", tmp_path / "graph.onnx", "--architectures", "SM86")
    assert done.returncode == 1 and "refused" in done.stdout and word in done.stdout.lower(), done.stdout + done.stderr


def test_signed_symmetric_is_taken_uint8_and_asymmetric_are_refused(tmp_path):
    onnx.save(small_quantized_graph(0, TensorProto.INT8), tmp_path / "good.onnx")
    succeed("compile_check.py", tmp_path / "good.onnx", "--architectures", "SM86")
    refuse(tmp_path, small_quantized_graph(0, TensorProto.UINT8), "")
    refuse(tmp_path, small_quantized_graph(3, TensorProto.INT8), "zero")


def test_mixed_types_are_refused(tmp_path):
    graph = small_quantized_graph(0, TensorProto.INT8)
    scale = next(i for i in graph.graph.initializer if i.name == "scale")
    half = onnx.helper.make_tensor("half", TensorProto.FLOAT16, [], [0.1])
    graph.graph.initializer.append(half)
    graph.graph.node[2].input[1] = "half"  # the weight becomes FP16, the activation stays FP32
    assert scale.data_type == TensorProto.FLOAT
    refuse(tmp_path, graph, "")


def test_a_missing_graph_or_record_is_named(tmp_path):
    done = run("compile_check.py", tmp_path / "graph.onnx")
    assert done.returncode == 1 and "graph.onnx: expected an ONNX graph" in done.stderr
    done = run("compile_check.py", "--repository", tmp_path)
    assert done.returncode == 1 and "model.json" in done.stderr and "torch2onnx.py" in done.stderr


def test_a_service_is_compiled_for_the_lengths_and_batches_of_its_record(tiny, tmp_path):
    options = ("--repository", tiny.repository, "--results", tmp_path, "--architectures", "SM86")
    done = succeed("compile_check.py", *options)
    assert done.stdout.count(" compiled, ") == 1 and list(tmp_path.glob("*/*/compile.json"))
