"""examples/pytorch_aoti: the package answers as torch does, a wrong request fails alone, and what is no package is named."""

import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import post, run, start_server, succeed

BUILD = "examples/pytorch_aoti/build.py"
compiled = pytest.mark.skipif(not os.environ.get("EXAMPLES"), reason="compiles for a minute; ./test.sh --examples")
BREAK = {  # name -> (what breaks a copy of the model, what its one line says)
    "missing": (lambda path: path.unlink(), "expected a graph for PyTorch, found none"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size // 2), "found: a file that is cut short"),
    "foreign": (lambda path: torch.save({}, path), "found: an archive without code"),
    "another": (lambda path: path.write_text("Dear sir"), "or no package of AOTInductor"),
}


def test_a_missing_compiler_is_named_in_a_line(tmp_path):
    done = run(BUILD, "--output", tmp_path, env={"PATH": str(tmp_path)})
    assert done.returncode == 1 and done.stderr.startswith("g++: expected a C++ compiler on PATH, found none")
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A tiny encoder's package with broken copies beside it, served."""
    from tiny_tasks import save_tiny

    folder = tmp_path_factory.mktemp("aoti")
    checkpoint, repository = save_tiny(folder / "checkpoint", "AutoModel"), folder / "repository"
    built = succeed(BUILD, "--model", checkpoint, "--output", repository, timeout_s=1800)
    for name, (spoil, _) in BREAK.items():
        shutil.copytree(repository / "encoder", repository / name)
        config = repository / name / "config.pbtxt"
        config.write_text(config.read_text().replace('"encoder"', f'"{name}"'))
        spoil(repository / name / "1/model.pt2")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AOTI_RUNTIME_CHECK_INPUTS", "1")
        done, (http, _) = start_server(others=[repository])
    yield SimpleNamespace(http=f"127.0.0.1:{http}", done=done, built=built, checkpoint=checkpoint)
    run("serve.sh", "stop", "--http-port", http)


def ask(served, *tensors):
    """(status, answer) to one tensor for each of ARGS."""
    inputs = [
        {"name": f"ARGS[{i}]", "shape": list(tensor.shape), "datatype": "INT64", "data": tensor.ravel().tolist()}
        for i, tensor in enumerate(tensors)
    ]
    return post(served, "encoder/infer", {"inputs": inputs})


def tokens(batch, length):
    """Random ids, a mask that pads all but the first text, and token types."""
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 30522, (batch, length)))
    mask = torch.ones_like(ids)
    mask[1:, (length + 1) // 2 :] = 0
    return ids, mask, torch.zeros_like(ids)


@compiled
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (5, 64), (1, 512)])
def test_the_served_package_answers_as_torch(served, shape):
    assert served.done.returncode == 0, served.done.stderr
    assert "AOTInductor agrees with torch" in served.built.stdout and not served.built.stderr
    ids, mask, types = tokens(*shape)
    model = transformers.AutoModel.from_pretrained(served.checkpoint).eval()
    with torch.inference_mode():
        hidden = model(ids, attention_mask=mask, token_type_ids=types).last_hidden_state
    pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    expected = torch.nn.functional.normalize(pooled).numpy()
    status, answer = ask(served, ids, mask, types)
    assert status == 200, answer
    np.testing.assert_allclose(np.reshape(answer["outputs"][0]["data"], expected.shape), expected, rtol=0, atol=1e-5)


@compiled
def test_a_wrong_request_is_answered_in_a_line_and_the_next_one_served(served):
    ids, mask, types = tokens(2, 8)
    long = tokens(1, 513)
    for tensors, words in (
        ((ids + 30522, mask, types), "index out of bounds: 0 <= "),
        ((ids - 30522, mask, types), "index out of bounds: 0 <= "),
        ((ids, mask[:, 1:], types), "expected size 7==8"),
        ((ids, mask[:1], types), "expected size 1==2"),
        (long, "expected to be <= 512, but got: 513"),
    ):
        status, answer = ask(served, *tensors)
        assert status == 500 and words in answer["error"] and "\n" not in answer["error"], answer
    assert ask(served, ids, mask, types)[0] == 200


@compiled
@pytest.mark.parametrize("name", BREAK)
def test_what_is_no_package_is_named(served, name):
    (line,) = [line for line in served.done.stderr.splitlines() if line.startswith(f"not served: {name}: ")]
    assert BREAK[name][1] in line
