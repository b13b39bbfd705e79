"""examples/dali: the page answers what it says, served pixels are DALI's own, a broken pipeline or picture fails alone.

Packages are installed, so this runs with EXAMPLES=1 only: ./test.sh --examples.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import copy_project, free_ports
from test_examples_fil import change, serve, stop
from test_tasks_readme import EXAMPLES, follow

from core.onnx_runtime import open_session
from serving.server import SERVER_ERRORS, infer

pytestmark = pytest.mark.skipif(not os.environ.get("EXAMPLES"), reason="installs packages; ./test.sh --examples")
STEPS = EXAMPLES["dali"]
SIZES = [(320, 240), (64, 200), (1000, 700), (224, 224), (31, 17)]
DIRECT = """
import sys
sys.path[:0] = ["examples/dali"]
import build, numpy as np
build.find_packages()
from nvidia import dali
files = [build.make_image(width, height, seed) for seed, (width, height) in enumerate({sizes})]
pipeline = dali.Pipeline.deserialize(open("build/dali/repository/preprocess/1/model.dali", "rb").read(), device_id=None)
pipeline.build()
pipeline.feed_input("IMAGE", [np.frombuffer(file, np.uint8) for file in files])
(found,) = pipeline.run()
np.savez(sys.argv[1], *[np.frombuffer(file, np.uint8) for file in files], pixels=np.stack([np.array(found.at(i)) for i in range(len(files))]))
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The page's steps in a copy of the project, up to the last, which stops the server."""
    project, ports = copy_project(tmp_path_factory.mktemp("dali")), free_ports(3)
    assert STEPS[-1][0] == "./serve.sh stop"
    follow(STEPS[:-1], project, ports)
    urls = {"url": f"127.0.0.1:{ports[0]}", "grpc": f"127.0.0.1:{ports[1]}"}
    yield SimpleNamespace(project=project, repository=project / "build/dali/repository", **urls)
    stop(project, ports)


@pytest.fixture(scope="module")
def direct(served, tmp_path_factory):
    """(JPEG files as arrays, their pixels by DALI itself); in a process of its own: the packages bring a folder nvidia."""
    path = tmp_path_factory.mktemp("direct") / "direct.npz"
    command = [sys.executable, "-c", DIRECT.format(sizes=SIZES), str(path)]
    done = subprocess.run(command, cwd=served.project, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = np.load(path)
    return [found[f"arr_{i}"] for i in range(len(SIZES))], found["pixels"]


def preprocess(files, url, protocol="grpc"):
    """Pixels of files of one request; those that are shorter get zeros at the end. Several threads need gRPC."""
    longest = max(map(len, files))
    rows = np.stack([np.pad(file, (0, longest - len(file))) for file in files])
    return infer("preprocess", {"IMAGE": rows}, ["PIXELS"], url, protocol)["PIXELS"]


def test_the_served_pixels_are_those_of_dali_run_directly(served, direct):
    files, expected = direct
    assert expected.shape == (len(SIZES), 3, 224, 224) and expected.std() > 0.1
    assert (preprocess(files, served.url, "http") == expected).all()
    with ThreadPoolExecutor(len(files)) as pool:  # at once, so that files of several lengths meet in a batch
        alone = list(pool.map(lambda file: preprocess([file], served.grpc)[0], files))
    assert (np.stack(alone) == expected).all()


def test_the_ensemble_answers_what_the_model_says_of_these_pixels(served, direct):
    files, pixels = direct
    expected = open_session(served.repository / "network/1/model.onnx").run(["SCORES"], {"PIXELS": pixels})[0]
    for file, scores in zip(files, expected, strict=True):
        found = infer("images", {"IMAGE": file[None]}, ["SCORES"], served.url)["SCORES"]
        assert np.abs(found[0] - scores).max() < 1e-6 and scores.argmax() == found[0].argmax()


def test_a_picture_that_is_none_fails_its_own_request(served, direct):
    files, expected = direct
    broken = np.frombuffer(b"this is no picture " * 20, np.uint8)
    with ThreadPoolExecutor(8) as pool:
        sent = [pool.submit(preprocess, [file], served.grpc) for file in [broken, *files, broken]]
    for future in (sent[0], sent[-1]):
        with pytest.raises(SERVER_ERRORS, match="expected what the pipeline reads, found"):
            future.result()
    assert all((future.result()[0] == pixels).all() for future, pixels in zip(sent[1:-1], expected, strict=True))


# --- what is refused ---------------------------------------------------------------------------


def cut(folder):
    path = folder / "1/model.dali"
    path.write_bytes(path.read_bytes()[:500])


BROKEN = {  # (name, what breaks a copy of the model) -> what its one line says
    ("cut", cut): "model.dali: expected a pipeline for a CPU, found another file",
    ("gone", lambda folder: (folder / "1/model.dali").unlink()): "found no file",
    ("network", lambda folder: shutil.copy(folder.parents[1] / "network.onnx", folder / "1/model.dali")): "another file",
    change("input", '"IMAGE"', '"PICTURE"'): "expected an input PICTURE as in config.pbtxt, found none",
    change("type", "TYPE_FP32", "TYPE_FP16"): "PIXELS: expected TYPE_FP32",
    change("dims", "[ 3, 224, 224 ]", "[ 3, -1 ]"): "PIXELS: expected 3 dims",
    change("batch", "max_batch_size: 8", "max_batch_size: 0"): "max_batch_size: expected at least 1",
}  # fmt: skip


def test_a_broken_pipeline_is_named_in_a_line_and_the_others_answer(served, direct, tmp_path):
    shutil.copy(served.repository / "network/1/model.onnx", tmp_path / "network.onnx")
    for name, spoil in [*BROKEN, ("whole", lambda folder: None)]:
        folder = tmp_path / "repository" / name
        shutil.copytree(served.repository / "preprocess", folder)
        change("", '"preprocess"', f'"{name}"')[1](folder)
        spoil(folder)
    ports = free_ports(3)
    done = serve(served.project, tmp_path / "repository", ports)
    try:
        assert done.returncode == 0, done.stderr
        said = done.stderr.splitlines()
        for (name, _), words in BROKEN.items():
            lines = [line for line in said if line.startswith(f"not served: {name}:")]
            assert len(lines) == 1 and words in lines[0], (name, said)
        files, expected = direct
        found = infer("whole", {"IMAGE": files[0][None]}, ["PIXELS"], f"127.0.0.1:{ports[0]}")["PIXELS"]
        assert (found[0] == expected[0]).all()
    finally:
        stop(served.project, ports)


def test_a_missing_package_is_named_with_its_command_and_the_model_answers(served):
    packages, ports = served.project / "build/dali/packages", free_ports(3)
    packages.rename(packages.with_name("elsewhere"))
    try:
        command = [served.project / ".venv/bin/python", served.project / "examples/dali/build.py"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1 and "pip install" in done.stderr and len(done.stderr.splitlines()) == 1
        done = serve(served.project, served.repository, ports)
        assert done.returncode == 0, done.stderr
        line = next(line for line in done.stderr.splitlines() if line.startswith("not served: preprocess:"))
        assert "expected the package nvidia-dali-cuda120, found none" in line and "pip install" in line
        pixels = np.zeros((1, 3, 224, 224), np.float32)
        assert infer("network", {"PIXELS": pixels}, ["SCORES"], f"127.0.0.1:{ports[0]}")["SCORES"].shape == (1, 10)
    finally:
        packages.with_name("elsewhere").rename(packages)
        stop(served.project, ports)
