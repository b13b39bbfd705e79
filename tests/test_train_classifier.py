"""train_classifier.py: an honest checkpoint from labelled texts, and the data that it refuses."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, run, run_here, succeed

import train_classifier
from core import labelled

# a folder with sst2_train.tsv and sst2_dev.tsv (text, label 0 or 1, no header); it is not part of the project
SST2 = Path(os.environ.get("SST2_FOLDER", "nowhere"))


def test_the_checkpoint_is_a_normal_one_that_beats_guessing(trained):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(trained.folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained.folder)
    assert model.config.id2label == {0: "negative", 1: "positive"}
    texts, labels = labelled.read_labelled(labelled.REVIEWS, "text", "label")
    texts, labels = texts[4::5], labels[4::5]  # those that were held out
    with torch.inference_mode():
        found = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.argmax(dim=1).tolist()
    accuracy = sum(model.config.id2label[i] == label for i, label in zip(found, labels, strict=True)) / len(texts)
    record = json.loads((trained.folder / "training.json").read_text())
    assert record["accuracy"] == pytest.approx(accuracy)
    assert accuracy >= 0.75
    assert json.loads((trained.results / "reviews-checkpoint/training.json").read_text()) == record


def test_the_projects_labelled_texts_are_balanced_and_not_doubled():
    texts, labels = labelled.read_labelled(labelled.REVIEWS, "text", "label")
    assert len(set(texts)) == len(texts) >= 120
    assert labels.count("positive") == labels.count("negative") == len(texts) // 2


@pytest.mark.skipif(not (SST2 / "sst2_train.tsv").is_file(), reason="SST2_FOLDER names no folder with sst2_train.tsv")
def test_sst2_dev_accuracy_is_at_least_080_within_15_minutes(tmp_path):
    columns = ("--text-column", 1, "--label-column", 2, "--label-names", "negative", "positive")
    files = ("--data", SST2 / "sst2_train.tsv", "--eval", SST2 / "sst2_dev.tsv")
    places = ("--output", tmp_path / "sst2", "--results", tmp_path / "results")
    succeed("train_classifier.py", *files, *columns, "--epochs", 2, *places, timeout_s=900)
    assert json.loads((tmp_path / "sst2/training.json").read_text())["accuracy"] >= 0.80


def write(tmp_path, content, name="data.tsv"):
    path = tmp_path / name
    path.write_text(content)
    return path


GOOD = "text\tlabel\ngood\tyes\nbad\tno\n"


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        ("text\tlabel\na\tyes\nb\tyes\n", (), ("at least two classes", "found only yes")),
        (GOOD, ("--text-column", "sentence"), ("column named sentence", "text, label", "--text-column")),
        (GOOD + "\tyes\n", (), ("expected a text in line 4",)),
        (GOOD + "fine\t\n", (), ("expected a label in line 4",)),
        (GOOD + "fine\n", (), ("2 columns in line 4", "found 1")),
        (GOOD, ("--text-column", 1, "--label-column", 3), ("3 columns in line 1", "found 2")),
        ("", (), ("an empty file",)),
        (GOOD, ("--label-names", "one"), ("--label-names", "2 different names")),
    ],
)
def test_bad_data_gets_one_clear_line(tmp_path, content, options, words):
    files = ("--data", write(tmp_path, content), "--output", tmp_path / "out", "--results", tmp_path)
    done = run_here(train_classifier, *files, *options)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert all(word in done.stderr for word in ("data.tsv" if "--label-names" not in options else "", *words)), (
        done.stderr
    )
    assert not (tmp_path / "out").exists()


def test_columns_of_a_csv_with_quotes_are_read(tmp_path):
    path = write(tmp_path, 'id,label,text\n1,yes,"good, very good"\n2,no,bad\n', "data.csv")
    assert labelled.read_labelled(path, "text", "label") == (["good, very good", "bad"], ["yes", "no"])
    assert labelled.read_labelled(ROOT / "assets/reviews.tsv", "1", "2")[0][0] == "text"  # numbers: there is no header


def test_a_quotation_mark_in_a_tsv_is_text(tmp_path):
    path = write(tmp_path, '1\t"unclosed\n0\tand another" one\n')
    assert labelled.read_labelled(path, "2", "1")[0] == ['"unclosed', 'and another" one']


def test_labels_are_names_or_numbers_of_the_model():
    assert labelled.class_indices("f", ["good", "bad"], ["bad", "good"]) == [1, 0]
    assert labelled.class_indices("f", ["1", "0"], ["bad", "good"]) == [1, 0]
    # names that are numbers too
    assert labelled.class_indices("f", ["1", "2"], ["1", "2", "3"]) == [0, 1]
    assert labelled.class_indices("f", ["0", "1", "2"], ["1", "2", "3"]) == [0, 1, 2]
    for labels, found in ((["awful"], "awful"), (["good", "0"], "names and numbers mixed")):
        with pytest.raises(SystemExit, match=f"expected labels bad, good or 0 to 1, found {found}"):
            labelled.class_indices("f", labels, ["bad", "good"])


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    path = write(tmp_path, "\ufefftext\tlabel\ngood\tyes\n")
    assert labelled.read_labelled(path, "text", "label") == (["good"], ["yes"])


def test_a_folder_with_other_things_is_not_replaced(tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/one.txt").write_text("dear")
    done = run("train_classifier.py", "--output", tmp_path / "letters")
    assert done.returncode == 1 and "name another" in done.stderr
    assert (tmp_path / "letters/one.txt").read_text() == "dear"
