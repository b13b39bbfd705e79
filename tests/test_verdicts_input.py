"""verdicts.py: models of more classes, and whatever it refuses; everything in process."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from conftest import run_here, save_classifier, tiny_config

import torch2onnx
import verdicts
from core import files
from serving.repository import extract


def record_of(results, name):
    (path,) = (results / name).glob("*/verdicts.json")
    return json.loads(path.read_text())


def study(place, *options, results):
    places = ("--repository", place.repository, "--results", results)
    return run_here(verdicts, "--model", place.checkpoint, *places, "--resamples", 200, *options)


# --- more than two classes -----------------------------------------------------------


@pytest.fixture(scope="session")
def three(tmp_path_factory):
    """A tiny classifier of three classes and texts whose labels it gives itself."""
    folder = tmp_path_factory.mktemp("three")
    checkpoint = save_classifier(folder / "three-checkpoint", tiny_config(("a", "b", "c")))
    options = ("--task", "classification", "--model", checkpoint, "--repository", folder / "three")
    assert run_here(torch2onnx, *options).returncode == 0
    texts = files.read_texts(files.TEXTS)[:60]
    (folder / "data.tsv").write_text("".join(f"{text}\t{i % 3}\n" for i, text in enumerate(texts)))
    return folder, checkpoint


def study_three(three, results, *options):
    folder, checkpoint = three
    data = ("--data", folder / "data.tsv", "--text-column", 1, "--label-column", 2, "--results", results)
    return run_here(verdicts, "--model", checkpoint, "--repository", folder / "three", *data, *options)


def test_of_three_classes_the_largest_logit_is_the_verdict(three, tmp_path):
    assert study_three(three, tmp_path).returncode == 0
    record = record_of(tmp_path, "three-checkpoint")
    assert record["threshold"] is None and np.shape(record["models"]["ONNX"]["confusion"]) == (3, 3)
    assert record["calibration"] is None  # nothing was quantized
    assert record["models"]["ONNX"]["flips"] == 0


def test_one_class_is_held_against_the_rest_when_named(three, tmp_path):
    done = study_three(three, tmp_path, "--positive", "b", "--precision", 0.2)
    assert done.returncode == 0 and "answers by another rule, the largest logit" in done.stdout
    record = record_of(tmp_path, "three-checkpoint")
    assert record["positive"] == "b" and np.shape(record["models"]["ONNX"]["confusion"]) == (2, 2)
    assert record["served_verdict"] == "largest logit" and record["threshold"] is not None
    done = study_three(three, tmp_path, "--positive", "d")
    assert done.returncode == 1 and "expected one of a, b, c, found d" in done.stderr


def test_a_threshold_that_no_score_reaches_is_one_line_with_the_best_precision(three, tmp_path):
    done = study_three(three, tmp_path, "--positive", "b", "--precision", 1)
    assert done.returncode == 1 and "found at best" in done.stderr and "lower --precision" in done.stderr
    assert not (tmp_path / "three-checkpoint").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("text\tlabel\ngood\tmaybe\n", ("labels negative, positive or 0 to 1", "found maybe")),
        ("text\tlabel\ngood\t1\n", ("at least two classes",)),
        ("text\tlabel\n \t1\n", ("expected a text in line 2",)),
        ("sentence\tlabel\ngood\t1\n", ("column named text",)),
    ],
)
def test_bad_data_gets_one_clear_line(reviews, tmp_path, content, words):
    (tmp_path / "data.tsv").write_text(content)
    done = study(reviews, "--data", tmp_path / "data.tsv", results=tmp_path)
    assert done.returncode == 1 and all(word in done.stderr for word in words), done.stderr


def test_numbers_that_leave_no_text_or_no_seed_are_bad_usage(tmp_path):
    for option, value in (("--max-texts", 0), ("--batch-size", 0), ("--seed", -1)):
        done = run_here(verdicts, "--model", "any", "--repository", tmp_path, option, value)
        assert done.returncode == 2 and "--max-texts: expected at least 1; --seed: 0 or more" in done.stderr


def test_the_place_of_the_results_may_be_named_before_the_command(tiny, tmp_path):
    for options in (("--results", tmp_path, "package"), ("package", "--results", tmp_path)):
        done = run_here(verdicts, *options, "--repository", tiny.repository)
        assert done.returncode == 1 and f"{tmp_path}/" in done.stderr and "verdicts.json" in done.stderr, done.stderr


def test_another_checkpoint_than_the_exported_one_is_named(reviews, tiny, tmp_path):
    options = ("--repository", reviews.repository, "--results", tmp_path, "--max-texts", 20)
    done = run_here(verdicts, "--model", tiny.checkpoint, *options)
    assert done.returncode == 1 and "expected the checkpoint behind" in done.stderr


def test_weights_that_were_trained_on_are_others_however_near(tiny, tmp_path):
    other = shutil.copytree(tiny.checkpoint, tmp_path / "tiny-checkpoint")
    tensors = safetensors.numpy.load_file(other / "model.safetensors")
    tensors["classifier.bias"] = tensors["classifier.bias"] + 1e-4
    safetensors.numpy.save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "data.tsv").write_text("text\tlabel\ngood\tgood\nbad\tbad\n")
    options = ("--repository", tiny.repository, "--results", tmp_path, "--data", tmp_path / "data.tsv")
    done = run_here(verdicts, "--model", other, *options)
    assert done.returncode == 1 and "expected the checkpoint behind" in done.stderr and "weights" in done.stderr


def test_a_package_has_nothing_to_be_compared_with(reviews, tmp_path):
    target = tmp_path / "package"
    extract(reviews.repository, target, "FP16")
    done = run_here(verdicts, "--model", reviews.checkpoint, "--repository", target)
    assert done.returncode == 1 and "expected the graph that the others are compared with" in done.stderr


def test_the_repository_of_another_task_is_named(tiny, tmp_path):
    card = {"task": "embedding", "inputs": [], "outputs": {}, "reference_sha256": ""}
    files.write_json(tmp_path / "model.json", card)
    for command in (("--model", tiny.checkpoint), ("package",)):
        done = run_here(verdicts, *command, "--repository", tmp_path)
        assert done.returncode == 1 and f"{tmp_path}: expected the repository of a classifier" in done.stderr


def test_a_url_without_a_server_is_one_line(reviews, tmp_path):
    for url, words in (("127.0.0.1:9", "expected a Triton server"), ("http://127.0.0.1:9", "expected HOST:PORT")):
        done = study(reviews, "--url", url, results=tmp_path)
        assert done.returncode == 1 and words in done.stderr
