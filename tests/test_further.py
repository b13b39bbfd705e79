"""BF16 and FP8: graphs that are asked for, emulated bit by bit as ml_dtypes rounds, refused where a GPU lacks them."""

import ml_dtypes
import numpy as np
import pytest
from conftest import copy_repository, link_copy, run, run_here, succeed
from onnx import TensorProto, helper, numpy_helper
from test_build_trt import WITH_STANDIN

import compile_check
import quantize
from core import files, onnx_runtime, repository
from core.tables import FURTHER, MODELS, PRECISIONS
from precision import int8_check, int8_rounding
from roofline.gpus import having
from serving import ask, build, one_pass, server
from verdict.logits import open_here

SCALE = np.float32(0.02)


def values_of_all_sizes(dtype):
    """float32 [4096, 8]: random, ties between two neighbours of a format, what underflows and what saturates."""
    random = np.random.default_rng(0)
    values = (random.normal(size=(4096, 8)) * 10 ** random.uniform(-9, 5, size=(4096, 8))).astype(np.float32)
    grid = np.arange(100, dtype=np.uint8 if np.dtype(dtype).itemsize == 1 else np.uint16).view(dtype)
    values.ravel()[:99] = (grid[1:].astype(np.float32) + grid[:-1].astype(np.float32)) / 2
    return values


def identity_graph(nodes, constants):
    """x [n, 8] -> nodes -> a MatMul with the identity -> y."""
    tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, 8]) for n in "xy"]
    arrays = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", tensors[:1], tensors[1:], arrays)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def test_fp8_is_emulated_as_ml_dtypes_rounds_and_saturates():
    zero, eye = np.zeros((), ml_dtypes.float8_e4m3fn), np.eye(8, dtype=ml_dtypes.float8_e4m3fn)
    constants = {"s": SCALE, "z": zero, "w": eye, "t": np.ones(8, np.float32), "zs": np.zeros(8, eye.dtype)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "t", "zs"], ["wd"], axis=1),
        helper.make_node("MatMul", ["d", "wd"], ["y"]),
    ]
    values = values_of_all_sizes(zero.dtype) * SCALE
    found = onnx_runtime.open_session(identity_graph(nodes, constants)).run(None, {"x": values})[0]
    inside = np.clip(values / SCALE, -448, 448)  # ml_dtypes makes a NaN of what is too large
    assert np.array_equal(found, inside.astype(zero.dtype).astype(np.float32) * SCALE)
    rounded = int8_rounding.round_values(values, SCALE, int8_rounding.FP8)
    assert np.array_equal(rounded, found)  # what the search takes for FP8 is what is executed


def test_bf16_is_emulated_as_ml_dtypes_rounds():
    low = ml_dtypes.bfloat16
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.BFLOAT16),
        helper.make_node("Mul", ["h", "three"], ["p"]),
        helper.make_node("MatMul", ["p", "w"], ["m"]),
        helper.make_node("Cast", ["m"], ["y"], to=TensorProto.FLOAT),
    ]
    constants = {"w": np.eye(8, dtype=low), "three": np.array(3, dtype=low)}
    values = values_of_all_sizes(low)
    found = onnx_runtime.open_session(identity_graph(nodes, constants)).run(None, {"x": values})[0]
    assert np.array_equal(found, (3 * values.astype(low).astype(np.float32)).astype(low).astype(np.float32))


@pytest.fixture(scope="module")
def further(tiny, tmp_path_factory):
    """The tiny classifier with graphs in FP8, BF16 and INT8, and what quantize.py said."""
    folder = tmp_path_factory.mktemp("further")
    place = link_copy(tiny.repository, folder / "tiny")
    options = ("--max-selection-texts", 8, "--target-cosine", 0.9, "--target-l2", 0.5, "--quick")
    done = run_here(
        quantize,
        "--precisions",
        "FP8",
        "BF16",
        "INT8",
        "--repository",
        place,
        "--results",
        folder / "results",
        *options,
    )
    assert done.returncode == 0, done.stderr
    return place, folder / "results", done


def record(results, name):
    (path,) = results.rglob(name)
    return files.read_json(path, "")


def test_further_graphs_have_the_tensors_of_the_reference_and_their_types(further):
    place, _, _ = further
    reference = repository.read_graph(repository.graph_path(place, "ONNX"))
    for precision, kind in (("FP8", TensorProto.FLOAT8E4M3FN), ("BF16", TensorProto.BFLOAT16)):
        graph = repository.read_graph(repository.graph_path(place, f"TRT_{precision}"))
        assert repository.graph_tensors(graph) == repository.graph_tensors(reference)
        assert kind in {i.data_type for i in graph.graph.initializer if len(i.dims) == 2}
    fp8 = repository.read_graph(repository.graph_path(place, "TRT_FP8"))
    assert int8_check.quantized_matmuls(fp8) == {
        row["matmul"] for row in record(further[1], "sensitivity_fp8.json")["matmuls"] if row["int8"]
    }
    with pytest.raises(SystemExit, match="signed INT8"):
        int8_check.check_quantization("g", fp8, int8_check.quantized_matmuls(fp8))


def test_every_precision_is_measured_on_texts_that_chose_nothing_and_says_what_is_emulated(further):
    found = record(further[1], "precisions.json")
    assert found["texts"]["count"] == 128 and set(found["precisions"]) == {"TF32", "BF16", "INT8", "FP8"}
    rows = found["precisions"]
    assert {name for name, row in rows.items() if row["emulated"]} == {"TF32", "BF16", "FP8"}
    assert 0 < rows["TF32"]["relative_l2_error"] < rows["BF16"]["relative_l2_error"] and rows["FP8"]["mean_cosine"] < 1
    assert further[2].stdout.count("emulated") == 3


def test_further_graphs_have_configs_and_the_five_stay_five(further, exported, tmp_path):
    assert (further[0] / "model_TRT_FP8/config.pbtxt").is_file()
    assert server.executed_by({"name": "model_TRT_FP8", "platform": "tensorrt_plan", "runtime": "model.py"}).endswith(
        "emulated"
    )
    succeed("serving.check", "--repository", further[0])
    folder = copy_repository(exported, tmp_path)
    assert (
        not list(folder.glob("model_TRT_FP8")) and "FP8" not in succeed("serving.check", "--repository", folder).stdout
    )


def test_a_study_in_process_says_what_is_emulated(further):
    keys = ["ONNX", "TRT_BF16", "TRT_INT8", "TRT_FP8"]
    found = open_here(further[0], repository.read_card(further[0]), keys).engines
    assert [found[key].removeprefix("ONNX Runtime, CPU, in process") for key in keys] == ["", ", emulated"] * 2


def test_a_graph_that_no_cpu_executes_is_not_packed_without_its_plan(further, tmp_path):
    done = run("serving.repository", "--repository", further[0], "--precision", "FP8", "--output", tmp_path / "own")
    assert done.returncode == 1 and "--engine tensorrt" in done.stderr
    assert "on a CPU" in one_pass.why_not("openvino", "FP8") and not one_pass.why_not("onnxruntime", "FP16")


def test_the_compile_check_leaves_out_what_an_architecture_lacks():
    assert [a for a in compile_check.ARCHITECTURES if compile_check.has(a, "TRT_FP8")] == ["SM89", "SM120"]
    assert all(compile_check.has(a, key) for a in compile_check.ARCHITECTURES for key in MODELS if key != "TRT_FP8")


def test_further_graphs_compile_for_ada_and_blackwell(further):
    paths = [repository.graph_path(further[0], f"TRT_{p}") for p in FURTHER]
    succeed("compile_check.py", *paths, "--architectures", "SM89", "SM120")
    done = run("compile_check.py", paths[1], "--architectures", "SM86")
    assert done.returncode == 1 and "refused" in done.stdout


def test_fp8_on_a_gpu_without_it_is_said_with_those_that_have_it():
    gpu = {"name": "Tesla T4", "compute_capability": "7.5"}
    with pytest.raises(SystemExit, match=r"FP8: .*8.9 or later \(RTX 4090, .*L4.*found Tesla T4 with 7.5"):
        build.check_gpu(["FP16", "FP8"], gpu)
    build.check_gpu(["FP8"], {"name": "NVIDIA L4", "compute_capability": "8.9"})
    build.check_gpu(["FP32", "BEST"], gpu)
    assert "A100 40GB" not in having("FP8") and "A100 40GB" in having("BF16") and "T4" not in having("BF16")


def test_further_plans_are_built_from_their_typed_graphs(further):
    options = ("--model-repository", further[0], "--dry-run", "--precisions", "FP8", "BF16")
    lines = run("build_trt.sh", *options, env=WITH_STANDIN).stdout.splitlines()
    assert [f"model_TRT_{p}/1/model.onnx" in line for p, line in zip(("FP8", "BF16"), lines, strict=True)] == [True] * 2
    assert all("--stronglyTyped" in line for line in lines)
    assert run("build_trt.sh", *options, "FP4", env=WITH_STANDIN).returncode == 2
    assert ask.how_built("FP8", 10) == ("TRT_FP8", ("--stronglyTyped",), "typed")
    assert ask.how_built("BF16", 11) == ("TRT_BF16", (), "typed")
    layer = {"Inputs": [{"Format/Datatype": "Row major linear FP8 format"}]}
    assert build.layer_precision(layer) == PRECISIONS["FP8"].plan_has
