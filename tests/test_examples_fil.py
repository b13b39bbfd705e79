"""examples/fil: the page answers what it says, the served trees are the libraries' own, a broken one fails alone.

Packages are installed, so this runs with EXAMPLES=1 only: ./test.sh --examples.
"""

import importlib.util
import os
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import copy_project, free_ports
from test_tasks_readme import EXAMPLES, follow

from core.labelled import read_labelled
from core.tables import REFERENCE
from serving.server import infer, text_tensor

pytestmark = pytest.mark.skipif(not os.environ.get("EXAMPLES"), reason="installs packages; ./test.sh --examples")
STEPS = EXAMPLES["fil"]
REQUESTS = ([0], [1, 2, 3], list(range(40)))  # rows of the held-out texts, sent together


def serve(project, repository, ports):
    """Start the project's server; returns what it said."""
    options = [f"--{name}-port={port}" for name, port in zip(("http", "grpc", "metrics"), ports, strict=True)]
    options = [part for option in options for part in option.split("=")]
    command = [project / "serve.sh", "start", "--any-repository", repository, "--device", "cpu", *options]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900)


def stop(project, ports):
    subprocess.run([project / "serve.sh", "stop", "--http-port", str(ports[0])], capture_output=True, check=True)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The page's steps in a copy of the project, up to the last, which stops the server."""
    project, ports = copy_project(tmp_path_factory.mktemp("fil")), free_ports(3)
    assert STEPS[-1][0] == "./serve.sh stop"
    follow(STEPS[:-1], project, ports)
    yield SimpleNamespace(project=project, repository=project / "build/fil/repository", url=f"127.0.0.1:{ports[0]}")
    stop(project, ports)


@pytest.fixture(scope="module")
def fitted(served):
    """The same trees as the page's, as their libraries have them: (models, texts)."""
    spec = importlib.util.spec_from_file_location("build", served.project / "examples/fil/build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    build.find_packages()
    texts, labels = read_labelled(build.REVIEWS, "text", "label")
    rows = [i for i in range(len(texts)) if i % build.EVAL_EVERY != build.EVAL_EVERY - 1]
    features = build.run_graph(served.project / "build/sentences", "sentence-embedding", [texts[i] for i in rows])
    classes = [int(labels[i] == "positive") for i in rows]
    return build.train(features, classes, SimpleNamespace(trees=300, seed=0, threads=1)), texts


def embed(texts, url):
    """The embeddings as the server's own encoder makes them: a last bit may lead down another branch."""
    names = ["INPUT_IDS", "ATTENTION_MASK", "TOKEN_TYPE_IDS"]
    tokens = infer("tokenizer", text_tensor(texts), names, url)
    return infer(f"model_{REFERENCE}", tokens, ["EMBEDDING"], url)["EMBEDDING"]


@pytest.mark.parametrize("library", ["xgboost", "lightgbm", "forest"])
def test_the_served_probabilities_are_the_librarys_own(library, served, fitted):
    models, texts = fitted
    features = np.concatenate([embed(texts[start : start + 8], served.url) for start in range(0, len(texts), 8)])
    expected = models[library].predict_proba(features)
    assert len(set(expected[:, 1].round(3))) > 20  # not all alike
    for rows in REQUESTS:
        found = infer(library, {"input__0": features[rows]}, ["output__0"], served.url)["output__0"]
        assert found.shape == (len(rows), 2) and np.abs(found - expected[rows]).max() <= 1e-5
        assert (found.argmax(1) == models[library].predict(features[rows])).all()


def test_the_ensemble_answers_for_a_text_what_the_library_does(served, fitted):
    models, texts = fitted
    for text in texts[4:60:5]:
        features = embed([text], served.url)
        found = infer("sentiment", text_tensor([text]), ["CLASS", "PROBABILITIES"], served.url)
        assert found["CLASS"].item() == models["xgboost"].predict(features).item()
        assert np.abs(found["PROBABILITIES"] - models["xgboost"].predict_proba(features)).max() <= 1e-5


# --- what is refused ---------------------------------------------------------------------------


def change(name, old, new):
    """A way to break a model's config."""

    def apply(folder):
        path = folder / "config.pbtxt"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return name, apply


def cut(folder):
    path = next((folder / "1").iterdir())
    path.write_bytes(path.read_bytes()[:5000])


BROKEN = {  # (name, what breaks a copy of the model) and the library -> what its one line says
    ("xgboost_cut", cut): "xgboost.json: expected trees of model_type xgboost_json",
    ("lightgbm_cut", cut): "model.txt: expected trees of model_type lightgbm",
    ("forest_cut", cut): "checkpoint.tl: expected trees of model_type treelite_checkpoint",
    ("xgboost_gone", lambda folder: shutil.rmtree(folder / "1") or (folder / "1").mkdir()): "found no file",
    change("xgboost_as_lightgbm", "xgboost_json", "lightgbm"): "model.txt: expected the trees",
    change("xgboost_as_onnx", "xgboost_json", "onnx"): "model_type: expected xgboost",
    change("xgboost_name", "is_classifier\"", "classifier\""): "is_classifier: expected true or false, found none",
    change("xgboost_threshold", '"threshold"', '"limit"'): "threshold: expected a number for a classifier, found none",
    change("xgboost_features", "[ 384 ]", "[ 383 ]"): "input__0: expected dims [ 384 ]",
    change("xgboost_columns", "[ 2 ]", "[ 3 ]"): "output__0: expected dims [ 1 ]",
    change("xgboost_tensor", '"input__0"', '"features"'): "expected one tensor input__0",
}  # fmt: skip


def of_network(folder):
    """Another backend's model in the place of the trees."""
    shutil.copy(folder.parents[1] / "network.onnx", folder / "1" / "xgboost.json")


def test_a_broken_model_is_named_in_a_line_and_the_others_answer(served, fitted, tmp_path):
    broken = BROKEN | {("xgboost_network", of_network): "xgboost.json: expected trees of model_type xgboost_json"}
    broken |= {change("xgboost_strict", '"0.5"', '"0.9"'): ""}
    shutil.copy(served.repository / f"model_{REFERENCE}/1/model.onnx", tmp_path / "network.onnx")
    for name, spoil in broken:
        folder = tmp_path / "repository" / name
        shutil.copytree(served.repository / name.partition("_")[0], folder)
        path = folder / "config.pbtxt"
        path.write_text(path.read_text().replace(f'name: "{name.partition("_")[0]}"', f'name: "{name}"'))
        spoil(folder)
    change("", "[ 2 ]", "[ 1 ]")[1](tmp_path / "repository/xgboost_strict")
    change("", '"predict_proba" value: { string_value: "true"', '"predict_proba" value: { string_value: "false"')[1](
        tmp_path / "repository/xgboost_strict"
    )
    ports = free_ports(3)
    done = serve(served.project, tmp_path / "repository", ports)
    try:
        assert done.returncode == 0, done.stderr
        said = (done.stdout + done.stderr).splitlines()
        for (name, _), words in broken.items():
            lines = [line for line in said if f"{name}:" in line]
            assert len(lines) == bool(words) and all(words in line for line in lines), (name, said)
        models, texts = fitted
        features = embed(texts[:8], served.url)
        found = infer("xgboost_strict", {"input__0": features}, ["output__0"], f"127.0.0.1:{ports[0]}")["output__0"]
        assert (found[:, 0] == (models["xgboost"].predict_proba(features)[:, 1] > 0.9)).all()
    finally:
        stop(served.project, ports)


def test_a_missing_package_is_named_with_its_command_and_the_encoder_answers(served):
    packages, ports = served.project / "build/fil/packages", free_ports(3)
    packages.rename(packages.with_name("elsewhere"))
    try:
        done = subprocess.run(
            [served.project / ".venv/bin/python", served.project / "examples/fil/build.py", "--encoder", "x"],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 1 and "expected the package in" in done.stderr and len(done.stderr.splitlines()) == 1
        done = serve(served.project, served.repository, ports)
        assert done.returncode == 0, done.stderr
        line = next(line for line in (done.stdout + done.stderr).splitlines() if "lightgbm:" in line)
        assert "expected the package treelite, found none" in line and "pip install" in line
        assert embed(["a film"], f"127.0.0.1:{ports[0]}").shape == (1, 384)
    finally:
        packages.with_name("elsewhere").rename(packages)
        stop(served.project, ports)
