"""sts.py: hidden states of each graph, and pairs that are refused."""

import json

import numpy as np
import onnx
import pytest
from conftest import copy_repository, run, run_here
from onnx import numpy_helper

import sts as script
from core.repository import tokenizer_path
from core.tokens import load_tokenizer

PAIRS = (
    ("A cat sleeps.", "A cat is sleeping.", 4.9),
    ("A cat sleeps.", "A dog runs, fast.", 1.5),
    ("A man plays the guitar.", "A man is playing a guitar.", 5.0),
    ("A man plays the guitar.", "The stock market fell.", 0.0),
    ("Rain fell all day.", "It rained the whole day.", 4.8),
)


def sts(exported, tmp_path, *options):
    places = ("--repository", exported.repository, "--results", tmp_path)
    return run("sts.py", *options, *places)


def test_hidden_states_and_similarities_of_every_graph(exported, tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("sentence1,sentence2,score\n" + "".join(f'"{a}","{b}",{score}\n' for a, b, score in PAIRS))
    done = sts(exported, tmp_path, "--sts", path, "--max-texts", 8)
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.rglob("sts.json")
    record = json.loads(written.read_text())
    assert record["pairs"]["count"] == 5 and record["texts"] == 8
    plans = record["plans"]
    assert list(plans) == ["ONNX", "TRT_FP32", "TRT_FP16", "TRT_INT8", "TRT_BEST"]
    assert plans["ONNX"]["mean_cosine"] == pytest.approx(1) and plans["ONNX"]["relative_l2_error"] == 0
    assert plans["TRT_FP16"]["mean_cosine"] > 0.9999
    assert 0.99 < plans["TRT_INT8"]["mean_cosine"] < 0.9999 and plans["TRT_BEST"]["mean_cosine"] > 0.99
    assert all(row["spearman"] > 0.85 for row in plans.values())


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a,b,1\na,b\n", "row 2"),
        ("a,b,1\n", "at least 3 pairs"),
        ("a,b,1\na,b,2\na,b,nan\n", "finite"),
        ("", "an empty file"),
    ],
)
def test_pairs_of_another_form_are_refused(exported, tmp_path, text, word):
    (tmp_path / "pairs.csv").write_text(text)
    done = sts(exported, tmp_path, "--sts", tmp_path / "pairs.csv")
    assert done.returncode == 1 and word in done.stderr and "Traceback" not in done.stderr


def test_a_missing_file_of_pairs_is_named(exported, tmp_path):
    done = sts(exported, tmp_path, "--sts", tmp_path / "none.csv")
    assert done.returncode == 1 and "none.csv: expected a CSV file" in done.stderr


def broken_copy(exported, tmp_path, change):
    """A repository whose INT8 graph was changed, and the options that name it."""
    folder = copy_repository(exported, tmp_path)
    path = folder / "model_TRT_INT8/1/model.onnx"
    graph = onnx.load(path)
    path.unlink()  # a link to the graph that other tests use
    change(graph)
    onnx.save(graph, path)
    return ("--repository", folder, "--results", tmp_path / "results", "--max-texts", 3)


def test_a_graph_of_another_export_is_refused(exported, tmp_path):
    def change(graph):
        onnx.helper.set_model_props(graph, {"reference_sha256": "0" * 64, "precision": "INT8"})

    done = run_here(script, *broken_copy(exported, tmp_path, change))
    assert done.returncode == 1 and "model_TRT_INT8/1/model.onnx: expected a graph made from" in done.stderr
    assert "found one made from 000000000000; run quantize.py" in done.stderr
    assert not (tmp_path / "results").exists()


def test_pairs_whose_vectors_are_not_finite_are_an_error(exported, tmp_path):
    """A word that only the pairs have answers NaN in one graph: not the same as not measured."""
    word = load_tokenizer(tokenizer_path(exported.repository)).encode("guitar").ids[1]

    def change(graph):
        largest = max(graph.graph.initializer, key=lambda i: len(i.raw_data))  # the words' embeddings
        values = numpy_helper.to_array(largest).copy()
        values[word] = np.nan
        largest.CopyFrom(numpy_helper.from_array(values, largest.name))

    options = broken_copy(exported, tmp_path, change)
    path = tmp_path / "pairs.csv"
    path.write_text("".join(f'"{a}","{b}",{score}\n' for a, b, score in PAIRS[:4]))
    done = run_here(script, "--sts", path, *options)
    assert done.returncode == 1 and "model_TRT_INT8/1/model.onnx: expected finite hidden states" in done.stderr
    assert "NaN or Inf in" in done.stderr and not (tmp_path / "results").exists()
