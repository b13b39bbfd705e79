"""verdicts.py: statistics against hand-made numbers, the study through the server, the package."""

import csv
import json
import shutil
import tarfile

import numpy as np
import pytest
import verdict_statistics as statistics
from conftest import run_here, save_classifier, start_server, succeed, tiny_config

import torch2onnx
import verdicts
from core import files, labelled
from serving import classifier_repository

# --- statistics ----------------------------------------------------------------------


def test_threshold_has_the_precision_and_the_best_recall_by_trying_all():
    generator = np.random.default_rng(1)
    positive = generator.random(300) < 0.4
    scores = np.round(generator.normal(positive * 1.0, 1.0), 1)  # with ties
    threshold = statistics.choose_threshold(scores, positive, 0.7)
    taken = scores >= threshold
    assert positive[taken].mean() >= 0.7
    for other in np.unique(scores):
        taken_there = scores >= other
        if positive[taken_there].mean() >= 0.7:
            assert positive[taken_there].sum() <= positive[taken].sum()


def test_threshold_lies_between_scores_where_rounding_decides_nothing():
    scores, positive = np.array([0.0, 1.0, 2.0, 3.0]), np.array([False, False, True, True])
    assert statistics.choose_threshold(scores, positive, 0.9) == 1.5


def test_a_precision_that_no_threshold_reaches_says_the_best_there_is():
    scores, positive = np.array([0.0, 1.0, 2.0, 3.0]), np.array([True, True, True, False])
    with pytest.raises(ValueError, match=r"precision 0.9, found at best 0.7500 \(recall 1.0000"):
        statistics.choose_threshold(scores, positive, 0.9)


def test_closest_threshold_undoes_a_shift():
    scores = np.linspace(-2, 2, 41)
    verdicts_ = (scores >= 0.05).astype(int)
    found = statistics.restored(scores + 0.5, verdicts_, 0.05)
    assert found["flips_before"] == 5 and found["flips_after"] == 0
    assert found["threshold"] == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("near", [-9, 0.3, 9])  # torch takes all, some, none
def test_closest_threshold_is_the_best_by_trying_all(near):
    generator = np.random.default_rng(2)
    reference = generator.normal(size=200)
    scores, verdicts_ = reference + generator.normal(0, 0.5, 200), (reference >= near).astype(int)
    best = statistics.closest_threshold(scores, verdicts_, 0.3)
    flips = ((scores >= best) != verdicts_).sum()
    tried = np.linspace(scores.min() - 2, scores.max() + 2, 5001)
    assert flips <= min(((scores >= t) != verdicts_).sum() for t in tried)


def test_exact_interval_has_a_width_where_all_agree():
    found = statistics.exact_interval(100, 100)
    assert found["high"] == 1 and found["low"] == pytest.approx(0.025 ** (1 / 100))
    needed = statistics.texts_for(0.995)
    assert (
        statistics.exact_interval(needed, needed)["low"]
        > 0.995
        >= statistics.exact_interval(needed - 1, needed - 1)["low"]
    )


def test_bootstrap_interval_of_a_share_is_that_of_the_binomial():
    hit = np.arange(400) < 320
    found = statistics.ratio_interval([(hit, np.ones_like(hit))], statistics.resample(400, 4000, 0))
    assert found["value"] == 0.8
    assert found["low"] == pytest.approx(0.8 - 1.96 * 0.02, abs=0.005)
    assert found["high"] == pytest.approx(0.8 + 1.96 * 0.02, abs=0.005)


def test_a_share_of_nothing_is_undefined():
    nothing = np.zeros(10, dtype=bool)
    assert statistics.ratio_interval([(nothing, nothing)], statistics.resample(10, 50, 0)) is None


def test_mcnemar_counts_who_is_right_alone():
    reference = np.array([True] * 8 + [False] * 1 + [True] * 5)
    other = np.array([False] * 8 + [True] * 1 + [True] * 5)
    found = statistics.mcnemar(reference, other)
    assert (found["only_torch_right"], found["only_this_right"]) == (8, 1)
    assert found["p"] == pytest.approx(2 * (1 + 9) / 2**9)
    assert statistics.mcnemar(reference, reference)["p"] == 1


def test_macro_averages_run_over_the_classes():
    classes, found = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 2])
    quality = statistics.quality(found, classes, range(3), statistics.resample(4, 20, 0))
    assert quality["accuracy"]["value"] == 0.75
    assert quality["precision"]["value"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert quality["recall"]["value"] == pytest.approx((0.5 + 1 + 1) / 3)


def conclude(latency, bound=0.995, texts=5000):
    known = (("ONNX", 0.999, 1e-6), ("TRT_FP16", 0.998, 1e-3), ("TRT_INT8", 0.98, 0.5))
    rows = {name: {"agreement": {"low": low}, "deviation": {"max_abs": error}} for name, low, error in known}
    return verdicts.conclude(
        rows, dict(zip(rows, latency, strict=True)), dict.fromkeys(rows, "somewhere"), bound, texts
    )


def test_the_fastest_of_those_that_agree_enough_wins():
    found = conclude((5.0, 3.0, 1.0))
    assert found["winner"] == "TRT_FP16" and "2 of 3 models pass" in found["text"]
    found = conclude((5.0, 3.0, 1.0), bound=0.9999, texts=100)
    assert found["winner"] is None and "needs at least 36887 texts" in found["text"]


def test_noise_does_not_make_a_model_the_fastest():
    assert conclude((3.1, 3.0, 1.0))["winner"] == "ONNX"


# --- the study -----------------------------------------------------------------------


def study(place, *options, results=None):
    places = ("--repository", place.repository, "--results", results or place.results)
    return run_here(verdicts, "--model", place.checkpoint, *places, "--resamples", 200, *options)


def record_of(results, name="reviews-checkpoint"):
    return json.loads((results / name / "verdicts.json").read_text())


@pytest.fixture(scope="session")
def studied(service):
    """A study of five models through the server, with a bound that few texts can show."""
    done = study(service, "--url", service.http, "--agreement", 0.9)
    assert done.returncode == 0, done.stderr
    return done


def test_study_through_the_server_shows_every_model_and_a_conclusion(studied, service):
    record = record_of(service.results)
    assert list(record["models"]) == ["torch", "ONNX", "TRT_FP16", "TRT_INT8", "TRT_BEST"]
    assert record["server"]["version"] and record["models"]["ONNX"]["engine"] == "ONNX Runtime, CPU"
    assert record["models"]["torch"]["quality"]["precision"]["value"] >= 0.9
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
    assert f"{row['deviation']['min']:10.4f}" in studied.stdout
    if row["closest_threshold"]:
        assert f"{row['closest_threshold']['threshold']:10.4f}" in studied.stdout


def test_verdicts_can_be_counted_again_from_the_logits(studied, service):
    record, path = record_of(service.results), service.results / "reviews-checkpoint/verdicts.csv"
    assert files.sha256(path) == record["logits_sha256"]
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for name, row in record["models"].items():
        logits = np.array([float(r[f"{name} positive"]) for r in rows])
        torch_ = np.array([float(r["torch positive"]) for r in rows])
        flips = (logits >= record["threshold"]) != (torch_ >= record["threshold"])
        assert flips.sum() == row["flips"]


def test_the_same_study_in_process_agrees(studied, service, tmp_path):
    assert study(service, "--agreement", 0.9, results=tmp_path).returncode == 0
    here, served = record_of(tmp_path), record_of(service.results)
    assert here["server"] is None and "in process" in here["models"]["ONNX"]["engine"]
    for name in ("torch", "ONNX", "TRT_FP16"):
        assert here["models"][name]["flips"] == served["models"][name]["flips"]
    assert here["threshold"] == pytest.approx(served["threshold"], abs=1e-3)


def test_texts_stay_out_where_they_may_not_be_passed_on(reviews, studied, service, tmp_path):
    texts, _ = labelled.read_labelled(labelled.REVIEWS, "text", "label")
    shown = [flip["text"] for row in record_of(service.results)["models"].values() for flip in row.get("flipped", ())]
    assert set(shown) <= set(texts) and "flip TRT_INT8: " in studied.stdout
    assert study(reviews, "--no-texts", "--max-texts", 60, results=tmp_path).returncode == 0
    content = (tmp_path / "reviews-checkpoint/verdicts.json").read_text()
    assert not any(text in content for text in texts) and '"label":' not in content
    header = (tmp_path / "reviews-checkpoint/verdicts.csv").read_text().split("\n")[0]
    assert header.startswith("text_number,torch negative,torch positive,ONNX negative")


def test_few_texts_show_nothing_and_package_says_so(reviews, tmp_path):
    done = study(reviews, "--max-texts", 40, results=tmp_path)
    assert done.returncode == 0 and "needs at least 736 texts" in done.stdout
    done = run_here(verdicts, "package", "--repository", reviews.repository, "--results", tmp_path)
    assert done.returncode == 1 and "expected a model that may be deployed" in done.stderr


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
    assert record["models"]["ONNX"]["flips"] == 0


def test_one_class_is_held_against_the_rest_when_named(three, tmp_path):
    assert study_three(three, tmp_path, "--positive", "b", "--precision", 0.2).returncode == 0
    record = record_of(tmp_path, "three-checkpoint")
    assert record["positive"] == "b" and np.shape(record["models"]["ONNX"]["confusion"]) == (2, 2)
    done = study_three(three, tmp_path, "--positive", "d")
    assert done.returncode == 1 and "expected one of a, b, c, found d" in done.stderr


def test_a_threshold_that_no_score_reaches_is_one_line_with_the_best_precision(three, tmp_path):
    done = study_three(three, tmp_path, "--positive", "b", "--precision", 1)
    assert done.returncode == 1 and "found at best" in done.stderr and "lower --precision" in done.stderr
    assert not (tmp_path / "three-checkpoint/verdicts.json").exists()


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


def test_another_checkpoint_than_the_exported_one_is_named(reviews, tiny, tmp_path):
    options = ("--repository", reviews.repository, "--results", tmp_path, "--max-texts", 20)
    done = run_here(verdicts, "--model", tiny.checkpoint, *options)
    assert done.returncode == 1 and "expected the checkpoint behind" in done.stderr


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
        # the nearest to it: the same Q/DQ with FP16 around them
        shutil.copy(service.repository / "model_TRT_BEST/1/model.onnx", graph)
        done = study(service, "--url", service.http, results=tmp_path)
    finally:
        shutil.move(tmp_path / "served.onnx", graph)
    assert done.returncode == 1 and f"expected the graph {graph}, found another in the server" in done.stderr
    assert "then start it again" in done.stderr and not (tmp_path / "reviews-checkpoint").exists()


def test_a_package_has_nothing_to_be_compared_with(reviews, tmp_path):
    options = ("--repository", reviews.repository, "--precision", "FP16", "--output", tmp_path / "package")
    assert run_here(classifier_repository, *options).returncode == 0
    done = run_here(verdicts, "--model", reviews.checkpoint, "--repository", tmp_path / "package")
    assert done.returncode == 1 and "expected the graph that the others are compared with" in done.stderr


def test_a_url_without_a_server_is_one_line(reviews, tmp_path):
    for url, words in (("127.0.0.1:9", "expected a Triton server"), ("http://127.0.0.1:9", "expected HOST:PORT")):
        done = study(reviews, "--url", url, results=tmp_path)
        assert done.returncode == 1 and words in done.stderr


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
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {"manifest.json"}
    assert set(manifest["files"]) == files
    assert all(files.sha256(folder / name) == digest for name, digest in manifest["files"].items())
    assert "flipped" not in manifest["study"]["verdicts"] and manifest["study"]["threshold"]


def test_the_package_serves_elsewhere_as_it_did_here(packed, service):
    import urllib.request

    def ask(http):
        url = f"http://{http}/v2/models/reviews/generate"
        with urllib.request.urlopen(url, b'{"TEXT": "I loved every minute."}', timeout=60) as response:
            return json.loads(response.read())

    done, (http, _) = start_server(packed[1] / "model_repository")
    assert done.returncode == 0, done.stderr
    try:
        answer, expected = ask(f"127.0.0.1:{http}"), ask(service.http)
    finally:
        succeed("serve.sh", "stop", "--http-port", http)
    assert answer["LABEL"] == expected["LABEL"] == "positive"


def test_a_plan_that_was_built_after_the_study_is_not_packed(studied, service, tmp_path):
    record = record_of(service.results)
    assert record["plan_sha256"] == {}  # nothing here is executed by TensorRT
    record["plan_sha256"][record["conclusion"]["winner"]] = "0" * 64
    files.write_json(tmp_path / "reviews-checkpoint/verdicts.json", record)
    done = run_here(verdicts, "package", "--repository", service.repository, "--results", tmp_path)
    assert done.returncode == 1 and "found one of another plan" in done.stderr


def test_a_study_of_other_graphs_is_not_packed(studied, service, tmp_path):
    path = tmp_path / "reviews-checkpoint/verdicts.json"
    record = record_of(service.results)
    record["graph_sha256"][record["conclusion"]["winner"]] = "0" * 64
    files.write_json(path, record)
    done = run_here(verdicts, "package", "--repository", service.repository, "--results", tmp_path)
    assert done.returncode == 1 and "expected a study of" in done.stderr
