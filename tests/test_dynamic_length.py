"""torch2onnx.py --dynamic-length: the five embedders on texts as long as they are, beside those of fixed length."""

from types import SimpleNamespace

import numpy as np
import pytest
import transformers
from conftest import run, start_server, succeed
from test_torch2onnx import TINY, places, save_checkpoint

import client
from core import files, onnx_runtime, tables
from core.repository import graph_path, tokenizer_path
from core.tokens import PAD_MULTIPLE, encode, load_tokenizer
from serving import server

TEXTS = ["short", "", "A text of a few words more.", "naïve café 🙂 " * 5, "word " * 300]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny checkpoint exported and quantized at both lengths; that of dynamic length is served."""
    folder, found = tmp_path_factory.mktemp("lengths"), {}
    checkpoint = save_checkpoint(folder / "tiny", transformers.BertConfig(**TINY))
    for name, options in (("fixed", ()), ("dynamic", ("--dynamic-length",))):
        found[name], options = folder / name / "model_repository", ("--max-length", 64, *options)
        succeed("torch2onnx.py", "--model", checkpoint, *options, *places(folder / name))
        succeed("quantize.py", "--naive", "--repository", found[name], "--results", folder / name / "results")
    done, (http, grpc) = start_server(found["dynamic"])
    assert done.returncode == 0, done.stderr
    yield SimpleNamespace(**found, http=f"127.0.0.1:{http}", grpc=f"127.0.0.1:{grpc}", results=folder / "results")
    succeed("serve.sh", "stop", "--http-port", http)


def test_configs_have_no_length_and_the_record_says_so(pair):
    for name in (*tables.EMBEDDERS.values(), "ensemble", "tokenizer"):
        config = (pair.dynamic / name / "config.pbtxt").read_text()
        assert "dims: -1" in config and "dims: 64" not in config, name
    card = files.read_json(pair.dynamic.parent / "assets/model.json", "")
    assert card["slug"] == "tiny-dynamic" and not card["fixed_length"] and card["outputs"] == {"EMBEDDING": [-1, 2]}
    done = succeed("serving.check", "--repository", pair.dynamic)
    assert "length up to 64" in done.stdout
    shapes = succeed("serving.build", "shapes", "--repository", pair.dynamic).stdout.split()
    assert "INPUT_IDS:1x1," in shapes[0] and "INPUT_IDS:8x64," in shapes[2]


def test_served_answers_are_as_long_as_their_text_and_those_of_the_fixed_length(pair):
    tokenizer = load_tokenizer(tokenizer_path(pair.fixed))
    sessions = {key: onnx_runtime.open_session(graph_path(pair.fixed, key)) for key in tables.EMBEDDERS}
    for text in TEXTS:
        feeds = encode(tokenizer, [text], ["INPUT_IDS", "ATTENTION_MASK"])
        real = feeds["ATTENTION_MASK"][0] > 0
        for key, found in client.call_triton(text, pair.http).items():
            assert found.shape == (1, -(-real.sum() // PAD_MULTIPLE) * PAD_MULTIPLE, 2)
            (expected,) = sessions[key].run(["EMBEDDING"], feeds)
            tolerance = 1e-5 if key in ("ONNX", "TRT_FP32") else 5e-3  # sums in another order round otherwise
            np.testing.assert_allclose(found[0, : real.sum()], expected[0, real], atol=tolerance)


def test_texts_of_unequal_length_share_a_request(pair):
    found = server.infer("ensemble", server.text_tensor(TEXTS), ["EMBEDDING_ONNX"], pair.http)["EMBEDDING_ONNX"]
    alone = [client.call_triton(text, pair.http)["ONNX"][0] for text in TEXTS]
    assert found.shape == (len(TEXTS), 64, 2)
    np.testing.assert_allclose(found[0, :3], alone[0][:3], atol=1e-5)


def test_quality_and_speed_are_measured_as_of_a_model_of_its_own(pair):
    places = ("--repository", pair.dynamic, "--results", pair.results)
    succeed("client.py", "--url", pair.http, *places, "--max-texts", 16)
    options = ("--quick", "--concurrency", 2, "--window-s", 0.2, "--stability-percent", 1000)
    done = run("perf.py", "--url", pair.grpc, *places, *options)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    (path,) = pair.results.glob("tiny-dynamic/*/perf.json")
    assert {r["model"] for r in files.read_json(path, "")["rows"] if "error" not in r} >= set(tables.EMBEDDERS)
    assert path.with_name("quality.json").is_file()
