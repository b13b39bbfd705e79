"""train_classifier.py: an honest checkpoint from labelled texts, and the data that it refuses."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, run, run_here, save_classifier, succeed, tiny_config

import train_classifier
from core import files, labelled
from core.checkpoint import weights_sha256
from core.record import results_folder

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
    folder = results_folder(trained.results, {"slug": "reviews-checkpoint"})
    assert json.loads((folder / "training.json").read_text()) == record
    assert record["weights_sha256"] == weights_sha256(trained.folder)  # what ties it to an export and its study


def test_the_projects_labelled_texts_are_balanced_and_not_doubled():
    texts, labels = labelled.read_labelled(labelled.REVIEWS, "text", "label")
    assert len(set(texts)) == len(texts) >= 120
    assert labels.count("positive") == labels.count("negative") == len(texts) // 2


@pytest.mark.skipif(not (SST2 / "sst2_train.tsv").is_file(), reason="SST2_FOLDER names no folder with sst2_train.tsv")
def test_sst2_dev_accuracy_is_at_least_080_within_15_minutes(tmp_path):
    columns = ("--text-column", 1, "--label-column", 2, "--label-names", "negative", "positive")
    texts = ("--data", SST2 / "sst2_train.tsv", "--eval", SST2 / "sst2_dev.tsv")
    places = ("--output", tmp_path / "sst2", "--results", tmp_path / "results")
    succeed("train_classifier.py", *texts, *columns, "--epochs", 2, *places, timeout_s=900)
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
        ("text\tlabel\na\tyes\nb\tno\n", (), ("at least 5 texts", "found 2", "--eval")),
        ("", (), ("an empty file",)),
        (GOOD, ("--label-names", "one"), ("--label-names", "2 different names")),
    ],
)
def test_bad_data_gets_one_clear_line(tmp_path, content, options, words):
    places = ("--data", write(tmp_path, content), "--output", tmp_path / "out", "--results", tmp_path)
    done = run_here(train_classifier, *places, *options)
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


# --- interrupted ---------------------------------------------------------------------


def content(folder):
    return {str(p.relative_to(folder)): files.sha256(p) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def retrain(tmp_path):
    """(checkpoint of a tiny first training, function that trains it anew)."""
    encoder = save_classifier(tmp_path / "encoder", tiny_config())
    output = tmp_path / "out" / "checkpoint"

    def again(seed):
        data = write(tmp_path, GOOD + "fine\tyes\nawful\tno\nwell\tyes\n")
        places = ("--data", data, "--output", output, "--results", tmp_path / "results")
        return run_here(train_classifier, "--model", encoder, *places, "--epochs", 1, "--seed", seed)

    done = again(0)
    assert done.returncode == 0, done.stderr
    return output, again


def test_a_training_replaces_the_one_before(retrain):
    output, again = retrain
    before = content(output)
    assert again(1).returncode == 0
    after = content(output)
    assert after.keys() == before.keys() and after["model.safetensors"] != before["model.safetensors"]
    assert [p.name for p in output.parent.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("moment", ["training", "saving", "swapping"])
def test_an_interrupted_training_leaves_the_old_checkpoint_whole(retrain, monkeypatch, moment):
    output, again = retrain
    before = content(output)
    replace = os.replace

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    def interrupted_swap(source, target):
        # the new folder's way into its place, and only the first try of it
        if Path(target) == output and (Path(source) / "training.json").is_file() and not tried:
            tried.append(source)
            raise KeyboardInterrupt
        replace(source, target)

    tried = []
    if moment == "training":
        monkeypatch.setattr("tasks.training.measure_accuracy", interrupted)
    elif moment == "saving":
        monkeypatch.setattr("tasks.training.weights_sha256", interrupted)
    else:
        monkeypatch.setattr("os.replace", interrupted_swap)
    with pytest.raises(KeyboardInterrupt):
        again(1)
    monkeypatch.undo()
    assert content(output) == before
    assert [p.name for p in output.parent.iterdir()] == ["checkpoint"]
