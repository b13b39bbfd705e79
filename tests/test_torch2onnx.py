"""torch2onnx.py: what is in the graph, which checkpoints it takes, and what it refuses."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
import torch
import transformers
from conftest import MINILM, ROOT, run, run_here, succeed

import torch2onnx
from core import checkpoint, files, onnx_runtime
from tasks import embedding

MINILM_FOLDER = checkpoint.packaged_folder()


def places(folder):
    return ("--repository", folder / "model_repository", "--assets", folder / "assets", "--results", folder / "results")


def save_checkpoint(folder, config, model_class=transformers.AutoModel):
    """A tiny checkpoint with seeded weights and MiniLM's tokenizer."""
    torch.manual_seed(0)
    build = getattr(model_class, "from_config", model_class)
    build(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(MINILM_FOLDER / name, folder)
    return folder


TINY = {
    "vocab_size": 30522,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def test_graph_has_the_agreed_tensors_and_only_a_dynamic_batch(exported):
    graph = onnx.load(exported.repository / "model_ONNX/1/model.onnx")
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*graph.graph.input, *graph.graph.output)
    }
    assert shapes == {"INPUT_IDS": ["batch", 128], "ATTENTION_MASK": ["batch", 128], "EMBEDDING": ["batch", 128, 2]}
    assert [(o.domain, o.version) for o in graph.opset_import] == [("", 19)]


def test_two_exports_give_the_same_file_without_paths_of_the_machine(exported, tmp_path):
    succeed("torch2onnx.py", "--model", MINILM, "--no-packed", *places(tmp_path))
    first = exported.repository / "model_ONNX/1/model.onnx"
    assert files.sha256(first) == files.sha256(tmp_path / "model_repository/model_ONNX/1/model.onnx")
    content = first.read_bytes()
    assert str(ROOT).encode() not in content and b"site-packages" not in content


def test_every_real_token_matches_torch_on_texts_outside_the_check(exported):
    texts = ["A text that no file holds.", "", "naïve café 🙂 " * 30]
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM_FOLDER)
    batch = tokenizer(texts, padding="max_length", truncation=True, max_length=128, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    transformer = transformers.AutoModel.from_pretrained(MINILM_FOLDER).eval()
    with torch.inference_mode():
        expected = embedding.Embedder(transformer, 2, seed=0)(ids, mask).numpy()
    session = onnx_runtime.open_session(exported.repository / "model_ONNX/1/model.onnx")
    found = session.run(None, {"INPUT_IDS": ids.numpy(), "ATTENTION_MASK": mask.numpy()})[0]
    real = mask.numpy().astype(bool)
    np.testing.assert_allclose(found[real], expected[real], atol=1e-4)


def test_above_the_allowed_error_no_model_is_left_not_even_an_older_one(tmp_path):
    older = tmp_path / "model_repository/model_ONNX/1/model.onnx"
    older.parent.mkdir(parents=True)
    older.write_bytes(b"older")
    folder = save_checkpoint(tmp_path / "checkpoint", transformers.BertConfig(**TINY))
    done = run_here(torch2onnx, "--model", folder, "--max-error", "1e-12", *places(tmp_path))
    assert done.returncode == 1 and "max abs error to torch" in done.stderr
    assert not list(older.parent.glob("*.onnx*"))


@pytest.mark.parametrize(
    "config",
    [
        transformers.RobertaConfig(**TINY, max_position_embeddings=514),
        transformers.MPNetConfig(**TINY, max_position_embeddings=514),
        transformers.DistilBertConfig(vocab_size=30522, dim=32, n_layers=2, n_heads=2, hidden_dim=64),
        transformers.ModernBertConfig(**TINY, max_position_embeddings=512, pad_token_id=0),
        transformers.DebertaV2Config(**TINY, relative_attention=True, pos_att_type=["c2p", "p2c"]),
        transformers.T5Config(vocab_size=30522, d_model=32, d_kv=16, num_layers=2, num_heads=2, d_ff=64),
    ],
    ids=lambda config: config.model_type,
)
def test_other_encoders_get_the_same_two_inputs(config, tmp_path):
    checkpoint = save_checkpoint(tmp_path / "checkpoint", config)
    done = run_here(torch2onnx, "--model", checkpoint, *places(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "MFLOPs per token" in done.stdout and "WARNING" not in done.stderr, done.stderr
    graph = onnx.load(tmp_path / "model_repository/model_ONNX/1/model.onnx")
    assert [i.name for i in graph.graph.input] == ["INPUT_IDS", "ATTENTION_MASK"]


def test_length_and_outputs_reach_graph_configs_and_tokenizer(tmp_path):
    checkpoint = save_checkpoint(tmp_path / "checkpoint", transformers.BertConfig(**TINY))
    options = ("--max-length", 48, "--num-outputs", 3)
    assert run_here(torch2onnx, "--model", checkpoint, *options, *places(tmp_path)).returncode == 0
    succeed("quantize.py", "--only", "FP32", *places(tmp_path)[:2])
    done = run("serving.check", "--repository", tmp_path / "model_repository")
    # the configs fit; the next thing that is missing is the next step's
    assert "model_TRT_FP16/1/model.onnx: expected an ONNX graph" in done.stderr and "quantize.py" in done.stderr
    config = (tmp_path / "model_repository/ensemble/config.pbtxt").read_text()
    assert "dims: 48\n  dims: 3" in config


def refuse(tmp_path, checkpoint, *words, options=()):
    done = run_here(torch2onnx, "--model", checkpoint, *options, *places(tmp_path))
    assert done.returncode == 1, done.stdout
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("model_repository/model_ONNX/1/*"))


def test_refuses_a_folder_without_tokenizer(tmp_path):
    folder = save_checkpoint(tmp_path / "c", transformers.BertConfig(**TINY))
    for name in ("tokenizer.json", "vocab.txt"):
        (folder / name).unlink()
    refuse(tmp_path, folder, "tokenizer", str(folder))


def test_refuses_a_folder_without_safetensors(tmp_path):
    folder = save_checkpoint(tmp_path / "c", transformers.BertConfig(**TINY))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuse(tmp_path, folder, "safetensors", str(folder))


def test_refuses_truncated_safetensors(tmp_path):
    folder = save_checkpoint(tmp_path / "c", transformers.BertConfig(**TINY))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    refuse(tmp_path, folder, "safetensors", str(folder))


def test_refuses_a_checkpoint_with_missing_weights(tmp_path):
    folder = save_checkpoint(tmp_path / "c", transformers.BertConfig(**TINY))
    transformers.BertConfig(**TINY | {"num_hidden_layers": 3}).save_pretrained(folder)
    refuse(tmp_path, folder, "missing", "encoder.layer.2")


def test_refuses_a_decoder(tmp_path):
    config = transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=1, n_head=2)
    refuse(tmp_path, save_checkpoint(tmp_path / "c", config), "encoder", "gpt2")


def test_refuses_a_length_beyond_the_positions(tmp_path):
    folder = save_checkpoint(tmp_path / "c", transformers.BertConfig(**TINY, max_position_embeddings=64))
    refuse(tmp_path, folder, "--max-length", "64", options=("--max-length", 65))


def test_unreachable_hub_without_cache_names_three_ways_on(tmp_path):
    environment = dict(os.environ, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "cache"))
    done = run("torch2onnx.py", "--model", "distilbert/distilbert-base-uncased", *places(tmp_path), env=environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for way in ("--model FOLDER", MINILM, "--random-weights"):
        assert way in done.stderr


def test_unreachable_hub_falls_back_to_the_packaged_model_loudly(tmp_path):
    environment = dict(os.environ, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "cache"))
    done = succeed("torch2onnx.py", "--packaged-if-offline", *places(tmp_path), env=environment)
    assert "WARNING" in done.stderr and "all-MiniLM-L6-v2" in done.stderr
    card = files.read_json(tmp_path / "assets/model.json", "")
    assert card["name"] == "all-MiniLM-L6-v2" and card["weights"] == "real"


def test_interrupted_export_leaves_no_model(tmp_path):
    folder = tmp_path / "model_repository/model_ONNX/1"
    command = [sys.executable, str(ROOT / "torch2onnx.py"), "--model", MINILM, *map(str, places(tmp_path))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(folder.glob("*.tmp")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) != 0
    assert not (folder / "model.onnx").exists() and not list(folder.glob("*.tmp"))
