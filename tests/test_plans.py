"""Plans as they lie in a repository: their proof, whether they fit, and what a GPU's server says of itself."""

import json
from types import SimpleNamespace

import pytest
from conftest import copy_repository
from test_build_trt import PRECISIONS, build, plan

from core import files
from serving import ask, plans
from serving import build as build_module
from serving.server import executed_by


def test_a_layer_file_without_details_is_refused(tmp_path):
    (tmp_path / "layers.json").write_text('{"Layers": ["matmul"], "Bindings": []}')
    with pytest.raises(ValueError, match="detailed"):
        build_module.count_precisions(tmp_path / "layers.json", {"matmul"})


def layer(name, types, kind="gemm", tactic="sm80_xmma_gemm"):
    inputs = [{"Format/Datatype": t} for t in types]
    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": inputs,
        "TacticName": tactic,
        "Metadata": f"[ONNX Layer: {name}]",
    }


def test_counts_take_the_gemm_and_the_narrowest_input(tmp_path):
    layers = [
        layer("a", ["Int8", "Half"]),
        layer("b", ["Half"]),
        layer("c", ["Row major linear FP32"]),
        layer("c", ["Row major Int8 format"], kind="Reformat", tactic="copy"),
        layer("mask", ["Int64", "Bool"], kind="kgen", tactic=""),
    ]
    (tmp_path / "layers.json").write_text(json.dumps({"Layers": layers}))
    counts = build_module.count_precisions(tmp_path / "layers.json", {"a", "b", "c", "d"})
    assert counts["weight_matmuls"] == {"INT8": 1, "FP16": 1, "FP32": 1}
    assert counts["weight_matmuls_not_named"] == 1
    assert counts["layers"] == {"INT8": 2, "FP16": 1, "FP32": 1, "other": 1}


# --- what is refused before serving ----------------------------------------------------


@pytest.fixture(scope="module")
def built_once(exported, tmp_path_factory):
    """The task's own repository with its four plans."""
    folder = copy_repository(exported, tmp_path_factory.mktemp("plans"))
    assert build(folder).returncode == 0
    return SimpleNamespace(repository=folder, assets=exported.assets)


@pytest.fixture
def built(built_once, tmp_path):
    return copy_repository(built_once, tmp_path)


def refuse(folder, words, **present):
    reference = files.sha256(folder / "model_ONNX/1/model.onnx")
    with pytest.raises(SystemExit) as error:
        plans.check_plan(folder, "TRT_FP16", present.pop("reference", reference), **present)
    assert all(word in str(error.value) for word in words), error.value


def test_matching_manifest_is_accepted(built):
    reference = files.sha256(built / "model_ONNX/1/model.onnx")
    gpu = {"name": "NVIDIA Stand-in GPU", "compute_capability": "8.6"}
    assert plans.check_plan(built, "TRT_FP16", reference, gpu, "10.16.1")["precision"] == "FP16"


def test_plans_of_another_graph_gpu_or_server_are_refused_naming_both(built):
    refuse(built, ["the export", "2" * 12], reference="2" * 64)
    refuse(built, ["NVIDIA L4", "NVIDIA Stand-in GPU"], gpu={"name": "NVIDIA L4", "compute_capability": "8.9"})
    refuse(built, ["TensorRT 11.0.0", "10.16.1"], tensorrt="11.0.0")
    plan(built, "FP16").write_bytes(b"another plan")
    refuse(built, ["SHA-256"])
    manifest = json.loads(plan(built, "FP16", "manifest.json").read_text())
    plan(built, "FP16", "manifest.json").write_text(
        json.dumps(manifest | {"plan_sha256": files.sha256(plan(built, "FP16")), "graph_sha256": "5" * 64})
    )
    refuse(built, ["the graph model_ONNX/1/model.onnx", "5" * 12])
    plan(built, "FP16", "manifest.json").write_text("[]")
    refuse(built, ["manifest.json", "tensorrt_version", "missing"])
    plan(built, "FP16", "manifest.json").unlink()
    refuse(built, ["manifest.json", "build_trt.sh"])


def test_the_check_before_serving_plans_reads_the_manifests(built, capsys):
    from serving.check import check_repository

    check_repository(built, plans=True)
    manifest = json.loads(plan(built, "BEST", "manifest.json").read_text())
    plan(built, "BEST", "manifest.json").write_text(json.dumps(manifest | {"tensorrt_version": "10.9.0"}))
    check_repository(built)
    with pytest.raises(SystemExit, match=r"TensorRT 10.16.1, found one built for 10.9.0"):
        check_repository(built, plans=True)


def test_the_client_checks_the_plans_that_are_served(built, capsys):
    reference = files.sha256(built / "model_ONNX/1/model.onnx")
    engines = {"ONNX": "ONNX Runtime, GPU"} | {f"TRT_{p}": "TensorRT, GPU" for p in PRECISIONS}
    server = {"version": "2.69.0", "engines": engines}
    assert len(plans.check_served_plans(built, reference, server)) == 4
    with pytest.raises(SystemExit, match="the export"):
        plans.check_served_plans(built, "3" * 64, server)
    plans.check_served_plans(built, reference, server | {"version": "9.9.9"})
    assert "unknown here" in capsys.readouterr().err
    cpu = {"version": "2.51.0", "engines": dict.fromkeys(engines, "ONNX Runtime, CPU")}
    assert plans.check_served_plans(built, "3" * 64, cpu) == {}


# --- what a server says of itself --------------------------------------------------------


def config(platform, kind, **others):
    """A model's config as Triton shows it: it replaces KIND_AUTO by the kind that it chose."""
    group = {"name": "model_0", "kind": kind, "count": 1, "gpus": [0] if kind == "KIND_GPU" else []}
    return {"name": "model", "platform": platform, "instance_group": [group]} | others


@pytest.mark.parametrize(
    ("shown", "engine"),
    [
        (config("tensorrt_plan", "KIND_GPU", backend="tensorrt", runtime=""), "TensorRT, GPU"),
        (config("onnxruntime_onnx", "KIND_GPU", backend="onnxruntime", runtime=""), "ONNX Runtime, GPU"),
        (config("onnxruntime_onnx", "KIND_CPU", backend="onnxruntime"), "ONNX Runtime, CPU"),
        (config("tensorrt_plan", "KIND_CPU", backend="tensorrt", runtime="model.py"), "ONNX Runtime, CPU"),
        (config("", "KIND_CPU", backend="python"), "python"),
    ],
)
def test_the_engine_is_read_from_what_the_server_shows(shown, engine):
    assert executed_by(shown) == engine


# --- what the shell scripts ask -----------------------------------------------------------


def test_every_precision_has_a_line_for_trtexec():
    assert [ask.how_built(p, 10) for p in PRECISIONS] == [
        ("ONNX", (), "flags"),
        ("ONNX", ("--fp16",), "flags"),
        ("TRT_INT8", ("--int8",), "flags"),
        ("TRT_BEST", ("--best",), "flags"),
    ]
    for precision in PRECISIONS:
        key = f"TRT_{precision}"
        assert ask.how_built(precision, 11) == (key, (), "typed")
        assert ask.how_built(precision, 10, typed=True) == (key, ("--stronglyTyped",), "typed")
    assert ask.how_built("INT8", 10, plain=True) == ("ONNX", ("--int8",), "flags")


def test_shapes_follow_the_record():
    card = {"max_length": 64, "fixed_length": True, "service": {"max_batch_size": 2}}
    assert plans.shapes(card) == [(1, 64), (2, 64), (2, 64)]
    card |= {"max_length": 512, "fixed_length": False, "service": {"max_batch_size": 32}}
    assert plans.shapes(card) == [(1, 1), (4, 128), (32, 512)]
    assert plans.shapes(card | {"max_length": 100}, 8) == [(1, 1), (8, 100), (32, 100)]
