"""build_trt.sh and the plans' proof, with a stand-in for trtexec (tests/trtexec_standin.py).

No plan here is a TensorRT plan: these tests hold the commands, the failures, the proof and
the manifests, not what TensorRT makes of a graph. compile_check.py does that.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, copy_repository, run, run_here

from core import files, tables
from serving import build as build_module

STANDIN = ROOT / "tests/trtexec_standin.py"
PRECISIONS = tables.SERVED
# the stand-in reads graphs, so its python3 has to be this one
WITH_STANDIN = dict(os.environ, TRTEXEC=str(STANDIN), PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.fixture
def place(exported, tmp_path):
    """A repository of one's own, with assets of its own beside it."""
    folder = copy_repository(exported, tmp_path)
    return folder


def build(folder, *options, **environment):
    variables = WITH_STANDIN | environment
    return run(
        "build_trt.sh", "--model-repository", folder, "--results", folder.parent / "results", *options, env=variables
    )


def plan(folder, precision, name="model.plan"):
    return folder / f"model_TRT_{precision}" / "1" / name


def summary(folder):
    (path,) = (folder.parent / "results/all-MiniLM-L6-v2").glob("*/plans.json")
    return files.read_json(path, "")


def dry_run(folder, version, *options):
    done = build(folder, "--dry-run", *options, STANDIN_VERSION=version)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


SHAPES = "--minShapes=INPUT_IDS:1x128\\,ATTENTION_MASK:1x128 --optShapes=INPUT_IDS:4x128\\,ATTENTION_MASK:4x128 --maxShapes=INPUT_IDS:8x128\\,ATTENTION_MASK:8x128"


def test_dry_run_prints_the_four_commands_of_tensorrt_10(place):
    lines = dry_run(place, "101601")
    wanted = [("model_ONNX", ""), ("model_ONNX", "--fp16"), ("model_TRT_INT8", "--int8"), ("model_TRT_BEST", "--best")]
    assert len(lines) == 4
    for line, precision, (model, flag) in zip(lines, PRECISIONS, wanted, strict=True):
        assert f"--onnx={place}/{model}/1/model.onnx" in line and SHAPES in line
        assert f"--saveEngine={plan(place, precision)}" in line and "--profilingVerbosity=detailed" in line
        assert [word for word in line.split() if word in ("--fp16", "--int8", "--best")] == flag.split()
        assert "--noTF32" not in line
    assert not list(place.glob("*/1/model.plan"))


def test_dry_run_prints_the_four_commands_of_tensorrt_11(place):
    lines = dry_run(place, "110000", "--no-tf32", "--opt-batch", "8", "--workspace", "2048")
    for line, precision in zip(lines, PRECISIONS, strict=True):
        assert f"--onnx={place}/model_TRT_{precision}/1/model.onnx" in line
        assert "--noTF32" in line and "--optShapes=INPUT_IDS:8x128" in line and "--memPoolSize=workspace:2048" in line
        assert not {"--fp16", "--int8", "--best", "--stronglyTyped"} & set(line.split())


def test_modules_in_the_working_directory_shadow_nothing(place, tmp_path):
    for name in ("core", "serving", "onnx", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')")
    done = run("build_trt.sh", "--model-repository", place, "--dry-run", env=WITH_STANDIN, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_typed_builds_the_typed_graphs_strongly_on_tensorrt_10_as_on_11(place):
    lines = dry_run(place, "101601", "--typed")
    for line, precision in zip(lines, PRECISIONS, strict=True):
        assert f"--onnx={place}/model_TRT_{precision}/1/model.onnx" in line
        assert [w for w in line.split() if w in ("--stronglyTyped", "--fp16", "--int8", "--best")] == [
            "--stronglyTyped"
        ]
    assert not any("--stronglyTyped" in line for line in dry_run(place, "110000", "--typed"))
    done = build(place, "--typed", "--only", "FP16")
    assert done.returncode == 0 and "by typed" in done.stdout, done.stderr
    manifest = json.loads(plan(place, "FP16", "manifest.json").read_text())
    assert (manifest["built_as"], manifest["graph"]) == ("typed", "model_TRT_FP16/1/model.onnx")
    assert build(place, "--typed", "--plain-int8").returncode == 2


def test_a_service_is_built_for_every_length_up_to_its_own(tiny, tmp_path):
    folder = shutil.copytree(tiny.repository, tmp_path / "tiny")
    card = files.read_json(folder / "model.json", "")
    done = build(folder, "--only", "FP16", "--dry-run")
    assert done.returncode == 0, done.stderr
    for what, shape in (("min", "1x1"), ("opt", "4x128"), ("max", f"8x{card['max_length']}")):
        assert f"--{what}Shapes=" + "\\,".join(f"{name}:{shape}" for name in card["inputs"]) in done.stdout


@pytest.mark.parametrize("version", ["101601", "110000"])
def test_four_plans_are_built_proven_and_noted(place, version):
    done = build(place, STANDIN_VERSION=version)
    assert done.returncode == 0, done.stderr
    reference = files.sha256(place / "model_ONNX/1/model.onnx")
    for precision, matmuls in zip(PRECISIONS, ({"FP32": 37}, {"FP16": 37}, None, None), strict=True):
        manifest = json.loads(plan(place, precision, "manifest.json").read_text())
        assert manifest["reference_sha256"] == reference
        assert manifest["graph_sha256"] == files.sha256(place / manifest["graph"])
        assert manifest["plan_sha256"] == files.sha256(plan(place, precision))
        assert manifest["tensorrt_version"] == ("10.16.1" if version == "101601" else "11.0.0")
        assert (manifest["gpu"], manifest["compute_capability"], manifest["tf32"]) == (
            "NVIDIA Stand-in GPU",
            "8.6",
            "on",
        )
        assert manifest["built_as"] == ("flags" if version == "101601" else "typed")
        assert manifest["command"][0] == STANDIN.name and manifest["build_s"] >= 0
        assert str(place.parent) not in json.dumps(manifest)
        counts = manifest["counts"]["weight_matmuls"]
        assert counts == matmuls if matmuls else counts["INT8"] == 37
        assert manifest["counts"]["weight_matmuls_not_named"] == 0
        if precision in ("INT8", "BEST"):
            assert len(manifest["calibration_sha256"]) == 64
    assert not list(place.rglob("*.tmp"))
    assert set(summary(place)["plans"]) == set(PRECISIONS)
    assert str(place.parent) not in json.dumps(summary(place))


def test_tf32_is_noted_as_off(place):
    assert build(place, "--only", "FP32", "--no-tf32").returncode == 0
    assert json.loads(plan(place, "FP32", "manifest.json").read_text())["tf32"] == "off"


def test_one_failure_of_four_keeps_the_other_three(place):
    done = build(place, STANDIN_FAIL="--int8")
    assert done.returncode == 1
    assert "INT8: expected trtexec to build it" in done.stderr and "Engine could not be created" in done.stderr
    assert "INT8 failing; the others were kept" in done.stderr
    assert [p for p in PRECISIONS if plan(place, p).exists()] == ["FP32", "FP16", "BEST"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("[E] Cuda failure: no CUDA-capable device is detected", "no GPU can be seen"),
        ("[E] Cuda failure: CUDA driver version is insufficient for CUDA runtime version", "driver is too old"),
        ("[E] Could not write: No space left on device", "disk is full"),
    ],
)
def test_known_causes_are_said_in_one_line(place, error, words):
    done = build(place, "--only", "FP32", STANDIN_FAIL="model.onnx", STANDIN_ERROR=error)
    assert done.returncode == 1 and words in done.stderr


@pytest.mark.parametrize("precision", ["FP8", "BEST"])
def test_an_older_tensorrt_is_refused_with_what_has_fp8(tmp_path, precision):
    done = build(tmp_path, "--dry-run", "--only", precision, STANDIN_VERSION="8601")
    assert done.returncode == 1 and "expected TensorRT 10 or later, found version 8601; use --docker" in done.stderr
    said = "; FP8 takes TensorRT 10 or later and a GPU of SM 89, 90, 100, 120"
    assert done.stderr.rstrip().endswith(said) == (precision == "FP8"), done.stderr


def test_an_unusable_trtexec_is_not_replaced_in_silence(place):
    done = build(place, "--dry-run", TRTEXEC="/nowhere/trtexec")
    assert done.returncode == 1 and "/nowhere/trtexec" in done.stderr


def test_plans_of_another_export_stay_out_of_the_summary(place):
    assert build(place).returncode == 0
    path = plan(place, "BEST", "manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"reference_sha256": "4" * 64}))
    done = build(place, "--only", "FP32")
    assert done.returncode == 0 and "of another export" in done.stderr
    assert set(summary(place)["plans"]) == {"FP32", "FP16", "INT8"}


@pytest.mark.parametrize("mode", ["half", "empty"])
def test_a_plan_that_was_not_finished_is_not_kept(place, mode):
    assert build(place, "--only", "FP16").returncode == 0
    before = plan(place, "FP16").read_bytes()
    done = build(place, "--only", "FP16", STANDIN_MODE=mode)
    assert done.returncode == 1
    assert plan(place, "FP16").read_bytes() == before and not list(place.rglob("*.tmp"))


def test_killed_in_the_middle_leaves_no_plan(place):
    environment = WITH_STANDIN | {"STANDIN_MODE": "hang"}
    places = ["--model-repository", str(place), "--results", str(place.parent / "results")]
    command = [str(ROOT / "build_trt.sh"), *places, "--only", "FP32"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not list(place.rglob("*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) != 0
    assert not plan(place, "FP32").exists() and not list(place.rglob("*.tmp"))


def test_int8_in_name_only_fails_the_build(place):
    done = build(place, "--only", "INT8", STANDIN_MODE="int8-in-name-only")
    assert done.returncode == 1 and "in name only" in done.stderr and "quantize.py" in done.stderr
    assert not plan(place, "INT8").exists()


def test_plain_int8_is_built_counted_and_explained(place):
    done = build(place, "--plain-int8", "--only", "INT8", STANDIN_MODE="int8-in-name-only")
    assert done.returncode == 0 and "placeholders" in done.stderr
    manifest = json.loads(plan(place, "INT8", "manifest.json").read_text())
    assert manifest["plain_int8"] and manifest["graph"] == "model_ONNX/1/model.onnx"
    assert "INT8" not in manifest["counts"]["weight_matmuls"]
    refused = build(place, "--plain-int8", "--dry-run", STANDIN_VERSION="110000")
    assert refused.returncode == 1 and "no precision flags" in refused.stderr


# --- what is refused before trtexec is called -----------------------------------------


def test_a_missing_graph_is_named(place):
    (place / "model_TRT_BEST/1/model.onnx").unlink()
    done = build(place)
    assert done.returncode == 1 and "model_TRT_BEST/1/model.onnx" in done.stderr and "quantize.py" in done.stderr
    assert not plan(place, "FP32").exists()


def test_an_older_graph_is_named(place):
    import onnx

    path = place / "model_TRT_INT8/1/model.onnx"
    graph = onnx.load(path)
    path.unlink()
    onnx.helper.set_model_props(graph, {"reference_sha256": "1" * 64, "precision": "INT8"})
    onnx.save(graph, path)
    done = build(place)
    assert done.returncode == 1 and str(path) in done.stderr and "111111111111" in done.stderr


def test_another_length_in_a_config_is_named(place):
    path = place / "model_TRT_FP16/config.pbtxt"
    path.write_text(path.read_text().replace("dims: 128", "dims: 64"))
    done = build(place)
    assert done.returncode == 1 and str(path) in done.stderr and "64" in done.stderr


def test_bad_usage_exits_2(place):
    for options in (
        ("--only", "FP4"),
        ("--opt-batch", "9"),
        ("--opt-length", "129"),
        ("--workspace", "much"),
        ("--only",),
        ("--fast",),
    ):
        assert build(place, *options).returncode == 2, options


def test_too_little_disk_is_said_before_building(place, monkeypatch):
    used = shutil.disk_usage(place)._replace(free=10 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: used)
    done = run_here(build_module, "graphs", "--repository", place, *PRECISIONS)
    assert done.returncode == 1 and "free disk" in done.stderr and "found 10 MiB" in done.stderr
