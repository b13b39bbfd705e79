"""Calibration: which texts may calibrate, and what sets a range."""

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from conftest import copy_repository, run, run_here

import client
import quantize
from bench import engines
from core import files
from core.repository import read_card, tokenizer_path
from core.tables import ATTENTION_MASK, INPUT_IDS
from core.tokens import encode, load_tokenizer
from precision import calibration, int8_graph, int8_recipes


def encode_two_texts(exported):
    served = load_tokenizer(tokenizer_path(exported.repository))
    return encode(served, ["A short text.", "Another one"], (INPUT_IDS, ATTENTION_MASK))


def test_padding_sets_no_range(exported):
    reference = onnx.load(exported.repository / "model_ONNX/1/model.onnx")
    encoded = encode_two_texts(exported)
    (tensor,) = {int8_graph.last_hidden_state(reference)}
    found = int8_recipes.capture_activations(reference, [tensor], encoded, 0)[tensor]
    assert found.shape == (encoded["ATTENTION_MASK"].sum(), 384) and len(found) == 10


@pytest.mark.parametrize(
    ("lines", "word"),
    [
        (["one short text"], "at least 16 different texts"),
        (["x"] * 40, "found 1 in"),
        ([str(i) for i in range(20)], "tokens, found"),
        ([""], "found none"),
    ],
)
def test_too_few_calibration_texts_are_refused(exported, tmp_path, lines, word):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(lines) + "\n")
    before = files.sha256(exported.repository / "model_TRT_INT8/1/model.onnx")
    places = ("--repository", exported.repository, "--results", tmp_path)
    done = run("quantize.py", "--calibration-texts", texts, *places)
    assert done.returncode == 1 and word in done.stderr and "Traceback" not in done.stderr
    assert files.sha256(exported.repository / "model_TRT_INT8/1/model.onnx") == before


def load_calibration_texts(exported, path, capsys):
    tokenizer = load_tokenizer(tokenizer_path(exported.repository))
    _, facts = calibration.load_texts(path, tokenizer, read_card(exported.repository), 32)
    return facts, capsys.readouterr().err


def test_texts_that_measure_quality_calibrate_nothing(exported, tmp_path, capsys):
    calibrating, measured = files.split_texts(files.read_texts(files.TEXTS))
    path = tmp_path / "texts.txt"
    path.write_text("\n".join([*calibrating[:30], *calibrating[:4], measured[0], f"  {measured[1].upper()} "]) + "\n")
    facts, said = load_calibration_texts(exported, path, capsys)
    assert facts["left_out"] == {"duplicates": 4, "quality_texts": 2}
    assert facts["calibration"] + facts["held_out"] == 30 and "WARNING: 2 calibration texts" in said
    path.write_text("\n".join(calibrating[:30]) + "\n")
    clean, said = load_calibration_texts(exported, path, capsys)
    assert clean["sha256"] == facts["sha256"] and not said


def test_the_texts_that_measure_quality_alone_are_too_few(exported, tmp_path, capsys):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(files.split_texts(files.read_texts(files.TEXTS))[1]) + "\n")
    with pytest.raises(SystemExit, match="at least 16 different texts that do not measure quality, found 0"):
        load_calibration_texts(exported, path, capsys)


def test_a_missing_file_of_calibration_texts_names_its_option(exported, tmp_path):
    places = ("--repository", exported.repository, "--results", tmp_path)
    done = run_here(quantize, "--calibration-texts", tmp_path / "none.txt", *places)
    assert done.returncode == 1 and "none.txt: expected a text file" in done.stderr
    assert "name one with --calibration-texts" in done.stderr


def test_texts_that_are_all_too_long_are_told(exported, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"{i} " + "many words " * 100 for i in range(16)) + "\n")
    places = ("--repository", copy_repository(exported, tmp_path), "--results", tmp_path)
    done = run("quantize.py", "--naive", "--only", "INT8", "--calibration-texts", texts, *places)
    assert done.returncode == 0 and "all 16 calibration texts are longer than the length" in done.stderr


def test_no_text_that_measures_quality_calibrates_or_selects():
    args = SimpleNamespace(texts=None, max_texts=None)
    measured = set(client.read_evaluation_texts(args))
    chosen, _ = calibration.read_calibration_texts(None)
    assert len(measured) == len(chosen) == 128 and not measured & set(chosen)


def test_no_text_that_calibrates_measures_an_engine(tiny, monkeypatch):
    asked = []

    def infer(_, tensors, *__):
        asked.extend(text.decode() for text in tensors["TEXT"].ravel())

    monkeypatch.setattr(engines, "infer", infer)
    monkeypatch.setattr(engines, "infer_graph", lambda *_: np.zeros((1, 2)))
    engines.rows_of("ONNX", SimpleNamespace(repository=tiny.repository, texts=None), "url")
    assert len(asked) == engines.DEVIATION_TEXTS and set(asked) <= set(files.evaluation_texts())
