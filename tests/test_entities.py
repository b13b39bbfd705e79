"""verdict.entities: the entities of each precision against those of FP32."""

from collections import Counter

import pytest
from conftest import link_copy, run_here

from core import files
from core.repository import graph_path
from verdict import entities

FOUND = Counter({(0, "PER", 0, 5): 1, (0, "LOC", 9, 14): 1, (1, "PER", 0, 3): 1})


def test_an_entity_counts_where_label_and_both_ends_are_the_same():
    assert entities.agreement(FOUND, FOUND)["f1"] == 1
    other = Counter({(0, "PER", 0, 5): 1, (0, "LOC", 9, 15): 1, (1, "LOC", 0, 3): 1, (2, "PER", 1, 2): 1})
    row = entities.agreement(FOUND, other)
    assert row["precision"] == pytest.approx(1 / 4) and row["recall"] == pytest.approx(1 / 3)
    assert row["f1"] == pytest.approx(2 / 7) and entities.agreement(FOUND, Counter())["f1"] == 0


def test_the_record_holds_each_graph_that_is_there(repositories, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("Maria Keller lives in Springfield.\nA short text.\n")
    options = ("--texts", texts, "--results", tmp_path)
    done = run_here(entities, "--repository", repositories["token-classification"], *options)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.rglob("entities.json")
    record = files.read_json(path, "")
    assert record["plans"]["ONNX"]["f1"] == 1 and record["plans"]["ONNX"]["holds"] and record["texts"]["count"] == 2
    done = run_here(entities, "--repository", repositories["question-answering"], *options)
    assert done.returncode == 1 and "expected a service of token-classification" in done.stderr
    repository = link_copy(repositories["token-classification"], tmp_path / "service")
    graph_path(repository, "ONNX").unlink()
    done = run_here(entities, "--repository", repository, *options)
    assert done.returncode == 1 and f"{graph_path(repository, 'ONNX')}: expected the graph that" in done.stderr
