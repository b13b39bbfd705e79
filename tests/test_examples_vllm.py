"""examples/vllm: the greedy texts of the served model are transformers'; what vLLM cannot serve is named."""

import json
import os
import shutil
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from conftest import ROOT, post, run, start_server, succeed

pytestmark = pytest.mark.skipif(not os.environ.get("EXAMPLES"), reason="installs vLLM; ./test.sh --examples")
SAID = {
    "missing": "model.json: expected the engine's arguments with a model",
    "empty": "expected a checkpoint, config.json and safetensors, found none",
    "truncated": "expected whole weights in safetensors, found another file or a part of one",
    "bare": "expected vllm in the model's environment",
}


def break_models(repository, folder):
    """Copies of the model that cannot be served, beside it."""
    whole = folder / "checkpoint"
    weights = (whole / "model.safetensors").read_bytes()[:1_000_000]
    for name in SAID:
        shutil.rmtree(repository / name, ignore_errors=True)
        shutil.copytree(repository / "smollm2", repository / name)
        config = (repository / name / "config.pbtxt").read_text().replace('"smollm2"', f'"{name}"')
        (repository / name / "config.pbtxt").write_text(config.split("parameters: {")[0] if name == "bare" else config)
        if name in ("empty", "truncated"):
            model = repository / name / "checkpoint"
            model.mkdir()
            (repository / name / "1/model.json").write_text(json.dumps({"model": str(model)}))
        if name == "truncated":
            shutil.copy(whole / "config.json", model)
            (model / "model.safetensors").write_bytes(weights)
    (repository / "missing/1/model.json").unlink()


@pytest.fixture(scope="module")
def served():
    folder = ROOT / "build/vllm"
    succeed("examples/vllm/build.py", timeout_s=3600)
    break_models(folder / "repository", folder)
    done, (http, _) = start_server(others=[folder / "repository"], timeout_s=900)
    yield SimpleNamespace(http=f"127.0.0.1:{http}", done=done, **json.loads((folder / "expected.json").read_text()))
    run("serve.sh", "stop", "--http-port", http)
    for name in SAID:
        shutil.rmtree(folder / "repository" / name)


def body_of(prompt, served, **others):
    return {"text_input": prompt, "parameters": {"max_tokens": served.max_tokens, "temperature": 0}} | others


def test_greedy_texts_are_those_of_transformers(served):
    assert served.done.returncode == 0, served.done.stderr
    ask = lambda prompt: post(served, "smollm2/generate", body_of(prompt, served, exclude_input_in_output=True))  # noqa: E731
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(ask, served.texts))
    assert {p: a["text_output"] for p, (_, a) in zip(served.texts, answers, strict=True)} == served.texts


def test_a_stream_has_the_same_text_in_pieces(served):
    prompt, text = next(iter(served.texts.items()))
    url = f"http://{served.http}/v2/models/smollm2/generate_stream"
    with urllib.request.urlopen(url, json.dumps(body_of(prompt, served, stream=True)).encode(), timeout=60) as response:
        lines = [line for line in response.read().decode().splitlines() if line.startswith("data: ")]
    pieces = [json.loads(line.removeprefix("data: "))["text_output"] for line in lines]
    assert "".join(pieces) == text and len(pieces) > served.max_tokens / 2


def test_a_bad_request_fails_alone(served):
    prompt = next(iter(served.texts))
    _, answer = post(served, "smollm2/generate", body_of(prompt, served) | {"parameters": {"temprature": 0}})
    assert "temprature" in answer["error"]
    _, answer = post(served, "smollm2/generate", body_of("word " * 3000, served))
    assert "error" in answer
    assert post(served, "smollm2/generate", body_of(prompt, served))[1]["text_output"].startswith(prompt)


@pytest.mark.parametrize("name", SAID)
def test_what_cannot_be_served_is_named(served, name):
    (line,) = [line for line in served.done.stderr.splitlines() if line.startswith(f"not served: {name}: ")]
    assert SAID[name] in line
