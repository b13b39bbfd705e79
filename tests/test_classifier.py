"""torch2onnx.py --task classification: the graph, labels, sources, and what it refuses."""

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
import transformers
from conftest import MINILM, run, run_here, save_classifier, succeed, tiny_config

import torch2onnx
from core import checkpoint, onnx_runtime, tokens


def export(folder, model, *options):
    return run_here(torch2onnx, "--task", "classification", "--model", model, "--repository", folder, *options)


def shapes(repository):
    graph = onnx.load(repository / "model_ONNX/1/model.onnx").graph
    return {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*graph.input, *graph.output)
    }


def test_graph_answers_logits_for_any_batch_and_length(reviews):
    tokens = {name: ["batch", "length"] for name in ("INPUT_IDS", "ATTENTION_MASK", "TOKEN_TYPE_IDS")}
    assert shapes(reviews.repository) == tokens | {"LOGITS": ["batch", 2]}


def test_logits_are_those_of_the_original_with_its_own_tokenizer(reviews):
    texts = ["A text that no file holds.", "", "naïve café 🙂", "word " * 700]
    tokenizer = transformers.AutoTokenizer.from_pretrained(reviews.checkpoint)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(reviews.checkpoint).eval()
    session = onnx_runtime.open_session(reviews.repository / "model_ONNX/1/model.onnx")
    served = tokens.load_tokenizer(reviews.repository / "tokenizer/tokenizer.json")
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=512, return_tensors="pt")
        with torch.inference_mode():
            expected = model(**ids).logits.numpy()
        feeds = tokens.encode(served, [text], ["INPUT_IDS", "ATTENTION_MASK", "TOKEN_TYPE_IDS"])
        np.testing.assert_allclose(session.run(["LOGITS"], feeds)[0], expected, atol=1e-4)


def test_a_text_is_cut_and_padded_on_the_tokenizers_side(tmp_path):
    sides = {"truncation_side": "left", "padding_side": "left"}
    folder = save_classifier(tmp_path / "c", tiny_config(), **sides)
    assert export(tmp_path / "r", folder, "--max-length", 16).returncode == 0
    served = tokens.load_tokenizer(tmp_path / "r/tokenizer/tokenizer.json")
    texts = ["one two", " ".join(f"word {i}" for i in range(40))]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    expected = tokenizer(texts, padding="max_length", truncation=True, max_length=16)
    assert tokenizer.truncation_side == "left" and expected["attention_mask"][0][0] == 0
    found = tokens.encode(served, texts, ["INPUT_IDS", "ATTENTION_MASK"])
    assert found["INPUT_IDS"].tolist() == expected["input_ids"]
    assert found["ATTENTION_MASK"].tolist() == expected["attention_mask"]


def test_a_fixed_length_reaches_graph_configs_and_tokenizer(tmp_path, tiny):
    assert export(tmp_path / "r", tiny.checkpoint, "--max-length", 24).returncode == 0
    assert shapes(tmp_path / "r")["INPUT_IDS"] == ["batch", 24]
    assert "dims: 24" in (tmp_path / "r/tokenizer/config.pbtxt").read_text()
    served = tokens.load_tokenizer(tmp_path / "r/tokenizer/tokenizer.json")
    assert tokens.encode(served, ["a", "word " * 99], ["INPUT_IDS"])["INPUT_IDS"].shape == (2, 24)
    succeed("serving.check", "--repository", tmp_path / "r")


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.mark.parametrize(
    "config",
    [
        transformers.DistilBertConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=64, num_labels=3),
        transformers.RobertaConfig(vocab_size=30522, max_position_embeddings=66, num_labels=3, **SMALL),
    ],
    ids=lambda config: config.model_type,
)
def test_token_types_are_an_input_only_where_the_model_wants_them(tmp_path, config):
    config.id2label = {0: "a", 1: "b", 2: "c"}
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path / "c")
    names = {"model_input_names": ["input_ids", "attention_mask"]}
    transformers.AutoTokenizer.from_pretrained(checkpoint.packaged_folder(), **names).save_pretrained(tmp_path / "c")
    done = export(tmp_path / "r", tmp_path / "c")
    assert done.returncode == 0, done.stderr
    assert set(shapes(tmp_path / "r")) == {"INPUT_IDS", "ATTENTION_MASK", "LOGITS"}
    card = json.loads((tmp_path / "r/model.json").read_text())
    # RoBERTa's positions start behind the padding id
    assert card["max_length"] == {"distilbert": 512, "roberta": 64}[config.model_type]


def test_labels_of_a_file_win_also_inverted(tmp_path, tiny):
    path = tmp_path / "settings.json"
    for content in ({"0": "no", "1": "yes"}, {"yes": 1, "no": 0}):
        path.write_text(json.dumps(content))
        assert export(tmp_path / "r", tiny.checkpoint, "--labels", path).returncode == 0
        assert json.loads((tmp_path / "r/postprocess/1/settings.json").read_text())["labels"] == ["no", "yes"]


def test_several_labels_at_once_are_scored_by_a_sigmoid(tmp_path):
    config = tiny_config(("joy", "anger", "fear"), problem_type="multi_label_classification")
    assert export(tmp_path / "r", save_classifier(tmp_path / "c", config)).returncode == 0
    settings = json.loads((tmp_path / "r/postprocess/1/settings.json").read_text())
    assert settings["labels"] == ["joy", "anger", "fear"] and settings["score"] == "sigmoid"


def test_labels_that_nobody_named_are_said(tmp_path):
    folder = save_classifier(tmp_path / "c", tiny_config(("LABEL_0", "LABEL_1")))
    done = export(tmp_path / "r", folder)
    assert done.returncode == 0 and "name them with --labels FILE" in done.stderr


def refuse(tmp_path, model, *words, options=()):
    done = export(tmp_path / "r", model, *options)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    line = next(line for line in done.stderr.splitlines() if "expected" in line)
    assert all(word in line for word in words), done.stderr
    assert not list(tmp_path.glob("r/model_ONNX/1/*.onnx"))


def test_refuses_a_checkpoint_without_a_head(tmp_path):
    refuse(tmp_path, MINILM, "the head of --task classification", "BertModel", "train_classifier.py")


def test_refuses_a_head_that_is_only_in_the_config(tmp_path):
    transformers.BertModel(tiny_config()).save_pretrained(tmp_path / "c")
    config = tiny_config()
    config.architectures = ["BertForSequenceClassification"]
    config.save_pretrained(tmp_path / "c")
    transformers.AutoTokenizer.from_pretrained(checkpoint.packaged_folder()).save_pretrained(tmp_path / "c")
    refuse(tmp_path, tmp_path / "c", "missing", "classifier")


def test_refuses_one_class(tmp_path):
    refuse(tmp_path, save_classifier(tmp_path / "c", tiny_config(("only",))), "at least two classes", "found 1")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"0": "no"}', ("for the 2 logits", "found 1")),
        ('{"0": "no", "1": "yes", "2": "maybe"}', ("for the 2 logits", "found 3")),
        ('{"0": "no", "1": "no"}', ("2 different names", "'no' doubled")),
        ('{"0": "no", "0": "yes"}', ("every label once", "'0' doubled")),
        ('{"no": 0, "yes": 0}', ("two labels for one",)),
        ('["no", "yes"]', ("expected labels by class",)),
        ("{", ("expected a JSON file of labels",)),
    ],
)
def test_refuses_labels_that_do_not_fit(tmp_path, tiny, content, words):
    (tmp_path / "settings.json").write_text(content)
    refuse(tmp_path, tiny.checkpoint, "settings.json", *words, options=("--labels", tmp_path / "settings.json"))


def test_refuses_a_checkpoint_with_doubled_labels(tmp_path):
    folder = save_classifier(tmp_path / "c", tiny_config())
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "same", "1": "same"}
    (folder / "config.json").write_text(json.dumps(config))
    refuse(tmp_path, folder, "config.json", "'same' doubled")


def test_refuses_a_tokenizer_of_another_vocabulary(tmp_path):
    config = tiny_config()
    config.vocab_size = 1000
    refuse(tmp_path, save_classifier(tmp_path / "c", config), "at most 1000 tokens", "found 30522", "--tokenizer")


def test_refuses_a_length_beyond_the_positions(tmp_path):
    folder = save_classifier(tmp_path / "c", tiny_config(max_position_embeddings=64))
    refuse(tmp_path, folder, "--max-length", "64", "found 65", options=("--max-length", 65))


def test_refuses_a_reserved_name(tmp_path, tiny):
    refuse(tmp_path, tiny.checkpoint, "--name", "found 'tokenizer'", options=("--name", "tokenizer"))


def test_the_checkpoint_is_not_written_into(tiny):
    done = run_here(torch2onnx, "--task", "classification", "--model", tiny.checkpoint, "--repository", tiny.checkpoint)
    assert done.returncode == 1 and "expected another folder than the checkpoint's" in done.stderr
    assert not (tiny.checkpoint / "model_ONNX").exists()


@pytest.mark.parametrize("content", [None, '{"task": "embedding"}', "{"])
def test_a_folder_of_something_else_is_not_written_into(tmp_path, tiny, content):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/letter.txt").write_text("dear")
    if content:
        (tmp_path / "r/model.json").write_text(content)
    refuse(tmp_path, tiny.checkpoint, "expected a new folder or a model repository", "--repository")


def test_an_export_under_another_name_takes_the_older_ensemble_away(tmp_path, tiny):
    for name in ("first", "second"):
        assert export(tmp_path / "r", tiny.checkpoint, "--name", name).returncode == 0
    assert (tmp_path / "r/second/config.pbtxt").is_file() and not (tmp_path / "r/first").exists()


def test_a_tokenizer_may_lie_elsewhere(tmp_path, tiny):
    shutil.copytree(tiny.checkpoint, tmp_path / "model")
    (tmp_path / "words").mkdir()
    for path in list((tmp_path / "model").glob("*token*")) + list((tmp_path / "model").glob("vocab*")):
        path.rename(tmp_path / "words" / path.name)
    done = export(tmp_path / "r", tmp_path / "model", "--tokenizer", tmp_path / "words")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "r/model.json").read_text())["tokenizer"]["name"] == "words"


def test_options_of_the_other_task_are_bad_usage(tmp_path):
    assert run("torch2onnx.py", "--labels", tmp_path).returncode == 2
    assert export(tmp_path / "r", MINILM, "--random-weights").returncode == 2
