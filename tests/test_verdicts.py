"""verdicts.py: the study through the server and in process, and the package that it names."""

import csv
import json
import shutil
import tarfile

import numpy as np
import onnx
import pytest
from conftest import run_here, start_server, succeed

import verdicts
from core import files, labelled
from core.record import results_folder
from core.tables import LABEL, LOGITS, SCORE
from serving.server import infer, text_tensor
from verdict import logits

# --- the study -----------------------------------------------------------------------


def study(place, *options, results=None):
    places = ("--repository", place.repository, "--results", results or place.results)
    return run_here(verdicts, "--model", place.checkpoint, *places, "--resamples", 200, *options)


def folder_of(results):
    return results_folder(results, {"slug": "reviews-checkpoint"})


def record_of(results):
    return json.loads((folder_of(results) / "verdicts.json").read_text())


def logits_of(results, name):
    """{"negative", "positive"} -> float [texts], of verdicts.csv."""
    with open(folder_of(results) / "verdicts.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {label: np.array([float(row[f"{name} {label}"]) for row in rows]) for label in ("negative", "positive")}


STUDY = ("--agreement", 0.9, "--precision", 1)


@pytest.fixture(scope="session")
def studied(service):
    """A study of five models through the server, with a bound that few texts can show.

    The precision is so high that the threshold is not where the two logits are equal.
    """
    done = study(service, "--url", service.http, *STUDY)
    assert done.returncode == 0, done.stderr
    return done


def test_study_through_the_server_shows_every_model_and_a_conclusion(studied, service):
    record = record_of(service.results)
    assert list(record["models"]) == ["torch", "ONNX", "TRT_FP16", "TRT_INT8", "TRT_BEST"]
    assert record["server"]["version"] and record["models"]["ONNX"]["engine"] == "ONNX Runtime, CPU"
    assert record["models"]["torch"]["quality"]["precision"]["value"] == 1
    for name in ("ONNX", "TRT_FP16"):
        assert record["models"][name]["flips"] == 0
    for name, row in record["models"].items():
        if name != "torch":
            assert row["flips"] == len(row["flipped"]) == row["confusion"][0][1] + row["confusion"][1][0]
            assert row["agreement"]["low"] <= row["agreement"]["value"] and row["latency_p50_ms"] > 0
    assert record["conclusion"]["winner"] in record["models"]
    assert "conclusion: " in studied.stdout and "McNemar" in studied.stdout
    row = record["models"]["TRT_INT8"]
    assert f"confusion TRT_INT8: torch positive: {row['confusion'][1][0]} not positive, " in studied.stdout
    assert f"from {row['deviation']['min']:.4f} to " in studied.stdout
    if row["closest_threshold"]:
        assert f"TRT_INT8: {row['closest_threshold']['threshold']:.4f} leaves " in studied.stdout


def test_verdicts_can_be_counted_again_from_the_logits(studied, service):
    record = record_of(service.results)
    assert files.sha256(folder_of(service.results) / "verdicts.csv") == record["logits_sha256"]
    original = logits_of(service.results, "torch")["positive"]
    for name, row in record["models"].items():
        logits = logits_of(service.results, name)["positive"]
        assert ((logits >= record["threshold"]) != (original >= record["threshold"])).sum() == row["flips"]


def test_the_record_says_which_training_and_which_calibration_is_behind_it(studied, trained, service, tmp_path):
    record = record_of(service.results)
    training = json.loads((trained.folder / "training.json").read_text())
    assert record["model"]["weights_sha256"] == training["weights_sha256"]
    path = folder_of(service.results) / "sensitivity.json"
    search = json.loads(path.read_text())
    assert record["calibration"] == {"file": "texts.txt", "count": search["texts"]["calibration"]}
    search["texts"]["sha256"] = "0" * 64  # a search whose graphs were replaced since
    files.write_json(folder_of(tmp_path) / "sensitivity.json", search)
    assert study(service, "--max-texts", 40, results=tmp_path).returncode == 0
    assert record_of(tmp_path)["calibration"] is None


def test_the_same_study_in_process_agrees(studied, service, tmp_path):
    assert study(service, *STUDY, results=tmp_path).returncode == 0
    here, served = record_of(tmp_path), record_of(service.results)
    assert here["server"] is None and "in process" in here["models"]["ONNX"]["engine"]
    for name in ("torch", "ONNX", "TRT_FP16"):
        assert here["models"][name]["flips"] == served["models"][name]["flips"]
    assert here["threshold"] == pytest.approx(served["threshold"], abs=1e-3)


def test_texts_stay_out_where_they_may_not_be_passed_on(reviews, studied, service, tmp_path, monkeypatch):
    texts, _ = labelled.read_labelled(labelled.REVIEWS, "text", "label")
    flipped = {name: row.get("flipped", ()) for name, row in record_of(service.results)["models"].items()}
    assert {flip["text"] for flips in flipped.values() for flip in flips} <= set(texts)
    # which texts flip depends on the CPU: with VNNI none may
    assert all((f"flip {name}: " in studied.stdout) == bool(flips) for name, flips in flipped.items())
    open_here = logits.open_here

    def negate_int8(*places):
        source = open_here(*places)
        return source._replace(logits=lambda key, feeds: source.logits(key, feeds) * (-1 if key == "TRT_INT8" else 1))

    monkeypatch.setattr(logits, "open_here", negate_int8)
    assert study(reviews, "--no-texts", "--max-texts", 60, results=tmp_path).returncode == 0
    assert record_of(tmp_path)["models"]["TRT_INT8"]["flips"] > 0
    content = (folder_of(tmp_path) / "verdicts.json").read_text()
    assert not any(text in content for text in texts) and '"label":' not in content
    header = (folder_of(tmp_path) / "verdicts.csv").read_text().split("\n")[0]
    assert header.startswith("text_number,torch negative,torch positive,ONNX negative")


def test_few_texts_show_nothing_and_package_says_so(reviews, tmp_path):
    done = study(reviews, "--max-texts", 40, results=tmp_path)
    assert done.returncode == 0 and "needs at least 736 texts" in done.stdout
    done = run_here(verdicts, "package", "--repository", reviews.repository, "--results", tmp_path)
    assert done.returncode == 1 and "expected a model that may be deployed" in done.stderr


def test_a_server_with_another_model_is_named(service, tiny, tmp_path):
    options = ("--repository", tiny.repository, "--results", tmp_path, "--url", service.http, "--label-column", "label")
    data = tmp_path / "data.tsv"
    data.write_text("text\tlabel\ngood\tgood\nbad\tbad\n")
    done = run_here(verdicts, "--model", tiny.checkpoint, *options, "--data", data)
    assert done.returncode == 1 and "expected the model of the repository, found another" in done.stderr


def test_a_graph_that_was_replaced_after_the_server_started_is_named(service, tmp_path):
    graph = service.repository / "model_TRT_INT8/1/model.onnx"
    graph.rename(tmp_path / "served.onnx")
    try:
        # the nearest to it: the same Q/DQ with FP16 around them, under the name of INT8
        other = onnx.load(service.repository / "model_TRT_BEST/1/model.onnx")
        for noted in other.metadata_props:
            noted.value = "INT8" if noted.value == "BEST" else noted.value
        onnx.save(other, graph)
        done = study(service, "--url", service.http, results=tmp_path)
    finally:
        shutil.move(tmp_path / "served.onnx", graph)
    assert done.returncode == 1 and f"expected the graph {graph}, found another in the server" in done.stderr
    assert "then start it again" in done.stderr and not (tmp_path / "reviews-checkpoint").exists()


# --- the package ---------------------------------------------------------------------


@pytest.fixture(scope="session")
def packed(studied, service, tmp_path_factory):
    """The winner's package, unpacked elsewhere: (archive, folder)."""
    folder = tmp_path_factory.mktemp("packed")
    options = ("--repository", service.repository, "--results", service.results, "--output", folder / "reviews.tar.gz")
    done = run_here(verdicts, "package", *options)
    assert done.returncode == 0, done.stderr
    with tarfile.open(folder / "reviews.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "reviews.tar.gz", next(p for p in folder.iterdir() if p.is_dir())


def test_the_manifest_holds_what_is_packed_and_why(packed, service):
    _, folder = packed
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["model"] == record_of(service.results)["conclusion"]["winner"]
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {"manifest.json"}
    assert set(manifest["files"]) == names
    assert all(files.sha256(folder / name) == digest for name, digest in manifest["files"].items())
    assert "flipped" not in manifest["study"]["verdicts"] and manifest["study"]["threshold"]


def test_the_package_serves_the_verdict_that_was_studied(packed, service):
    record = record_of(service.results)
    assert record["served_verdict"] == "threshold"
    logits, threshold = logits_of(service.results, record["conclusion"]["winner"]), record["threshold"]
    distance, reaches = np.abs(logits["positive"] - threshold), logits["positive"] >= threshold
    other = np.flatnonzero(reaches != (logits["positive"] > logits["negative"]))
    assert len(other)  # texts that the largest logit would answer otherwise
    chosen = sorted({*np.argsort(distance)[:6], *other[:6]})
    texts, _ = labelled.read_labelled(labelled.REVIEWS, "text", "label")
    done, (http, _) = start_server(packed[1] / "model_repository")
    assert done.returncode == 0, done.stderr
    try:
        answers = [
            infer("reviews", text_tensor([texts[i]]), [LABEL, SCORE, LOGITS], f"127.0.0.1:{http}") for i in chosen
        ]
    finally:
        succeed("serve.sh", "stop", "--http-port", http)
    for i, answer in zip(chosen, answers, strict=True):
        found = answer[LOGITS][0]
        positive = bool(found[1] >= threshold)
        assert answer[LABEL].item().decode() == ("positive" if positive else "negative"), texts[i]
        # of the label that is answered
        assert answer[SCORE].item() == pytest.approx(np.exp(found[int(positive)]) / np.exp(found).sum(), abs=1e-5)
        # alone and in a batch a text's INT8 logits differ a little: at the threshold itself that decides
        assert positive == reaches[i] or distance[i] < 0.1, texts[i]


def test_a_plan_that_was_built_after_the_study_is_not_packed(studied, service, tmp_path):
    record = record_of(service.results)
    assert record["plan_sha256"] == {}  # nothing here is executed by TensorRT
    record["plan_sha256"][record["conclusion"]["winner"]] = "0" * 64
    files.write_json(folder_of(tmp_path) / "verdicts.json", record)
    done = run_here(verdicts, "package", "--repository", service.repository, "--results", tmp_path)
    assert done.returncode == 1 and "found one of another plan" in done.stderr


def test_a_study_of_other_graphs_is_not_packed(studied, service, tmp_path):
    record = record_of(service.results)
    record["graph_sha256"][record["conclusion"]["winner"]] = "0" * 64
    files.write_json(folder_of(tmp_path) / "verdicts.json", record)
    done = run_here(verdicts, "package", "--repository", service.repository, "--results", tmp_path)
    assert done.returncode == 1 and "expected a study of" in done.stderr
