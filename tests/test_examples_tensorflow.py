"""examples/tensorflow: the SavedModel and its conversion answer as TensorFlow does; what is no SavedModel is named."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, post, run, start_server, succeed

pytestmark = pytest.mark.skipif(not os.environ.get("EXAMPLES"), reason="installs TensorFlow; ./test.sh --examples")
BREAK = {
    "missing": lambda folder: shutil.rmtree(folder / "1/model.savedmodel"),
    "truncated": lambda folder: os.truncate(folder / "1/model.savedmodel/saved_model.pb", 3000),
    "foreign": lambda folder: (shutil.rmtree(folder / "1/model.savedmodel"), (folder / "1/model.savedmodel").touch()),
    "bare": lambda folder: None,
}
SAID = {
    "missing": "expected a SavedModel, a folder with saved_model.pb, found none",
    "truncated": "expected a whole SavedModel, found",
    "foreign": "expected a SavedModel, a folder with saved_model.pb, found a file",
    "bare": "expected tensorflow in the model's environment",
}


@pytest.fixture(scope="module")
def served():
    """The example's repository with broken copies of its SavedModel beside it, served."""
    folder = ROOT / "build/tensorflow"
    succeed("examples/tensorflow/build.py", timeout_s=1800)
    repository = folder / "repository"
    for name, spoil in BREAK.items():
        shutil.rmtree(repository / name, ignore_errors=True)
        shutil.copytree(repository / "saved_model", repository / name)
        spoil(repository / name)
        config = (repository / name / "config.pbtxt").read_text().replace('"saved_model"', f'"{name}"')
        (repository / name / "config.pbtxt").write_text(config.split("parameters: {")[0] if name == "bare" else config)
    done, (http, _) = start_server(others=[repository])
    expected = json.loads((folder / "expected.json").read_text())
    yield SimpleNamespace(http=f"127.0.0.1:{http}", done=done, **{k: np.array(v) for k, v in expected.items()})
    run("serve.sh", "stop", "--http-port", http)


@pytest.mark.parametrize("model", ["saved_model", "converted"])
def test_the_served_model_answers_as_tensorflow(served, model):
    assert served.done.returncode == 0, served.done.stderr
    features = served.features
    body = {"name": "features", "shape": list(features.shape), "datatype": "FP32", "data": features.ravel().tolist()}
    status, answer = post(served, f"{model}/infer", {"inputs": [body]})
    assert status == 200, answer
    found = np.array(answer["outputs"][0]["data"]).reshape(served.probabilities.shape)
    np.testing.assert_allclose(found, served.probabilities, rtol=0, atol=0 if model == "saved_model" else 1e-6)


@pytest.mark.parametrize("name", BREAK)
def test_what_is_no_saved_model_is_named(served, name):
    (line,) = [line for line in served.done.stderr.splitlines() if line.startswith(f"not served: {name}: ")]
    assert SAID[name] in line
