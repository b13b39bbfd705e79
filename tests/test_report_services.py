"""report.py: what it says of services, of what they survived, and of peers and targets."""

import pytest
import report_data as data
from report_data import block, report, written


@pytest.fixture
def place(tmp_path):
    """Deviations of an encoder on one machine, and a report of one's own."""
    return data.make_place(tmp_path)


# --- services ------------------------------------------------------------------------


def test_a_service_that_generates_is_a_row_and_has_a_table_of_its_ways(place):
    place.text.write_text(data.TEXT + "\n<!-- begin services -->\nold\n<!-- end services -->\n")
    data.write_generation(place.results / "smollm2" / "a-cpu", data.generator())
    text = block(written(place), "services")
    assert "| tokens/s, batch 1 / 8 (× transformers' generate()) |" in text
    assert "| 1.5e-06 | FP32 | 50.0 / 400.0 (2.00 / 2.00) |" in text and "smollm2 (pip package" in text
    tables = (place.results / "smollm2" / "a-cpu" / "tables.md").read_text()
    assert "| served, batch 8 | 400.0 (399.0 to 402.0) |  |  |" in tables
    assert "| in process, batch 8 | 416.0 (415.0 to 418.0) | 0.96 | 8 of 8 |" in tables
    assert report(place, "--check").returncode == 0


def test_engines_are_held_against_onnx_runtime_and_one_is_named_for_each_wish(place):
    def row(engine, precision, speed, memory, error, **others):
        level = {"texts_per_s": {"median": speed, "min": speed - 1, "max": speed + 1}, "latency_p50_ms": 9.0, "n": 60}
        found = {
            "engine": engine,
            "precision": precision,
            "executed_by": engine,
            "relative_l2_error": error,
            "holds": True,
        }
        return found | {"start_s": [9.0, 4.0, 5.0], "memory_mib": memory, "levels": {"1": level, "8": level}} | others

    rows = [
        row("onnxruntime", "FP32", 50.0, 400.0, 0.0),
        row("openvino", "INT8", 125.0, 500.0, 0.05),
        row("openvino", "BEST", 500.0, 600.0, 0.5, holds=False),
        {"engine": "pytorch", "precision": "FP32", "error": "it ended by itself"},
    ]
    settings = {"rounds": 3, "requests": {"1": 60, "8": 160}}
    record = data.record(data.classifier(), rows=rows, settings=settings, texts={"file": "a.txt", "compared": 64})
    data.write(place.results / "reviews" / "a-cpu", "engines", record)
    written(place)
    text = (place.results / "reviews" / "a-cpu" / "tables.md").read_text()
    assert (
        "| OpenVINO, INT8 | 5.0% |  | yes | 125.0 (124.0 to 126.0) | 2.50 |" in text and "9.0 first, 5.0 median" in text
    )
    assert "not measured: it ended by itself" in text
    assert (
        "| most texts/s, 8 together, most texts/s, one at a time | OpenVINO, INT8 | 125.0: 2.50 × ONNX Runtime, FP32 |"
        in text
    )
    assert "ONNX Runtime, FP32 | 400.0: no other is better |" in text

    # what did not hold on the more texts of the choice is not recommended
    found = {"alone_texts_per_s": 9.0, "together_texts_per_s": 9.0, "relative_l2_error": 0.01}
    names = (("onnxruntime", "FP32", True), ("openvino", "INT8", False))
    choice = [found | {"engine": engine, "precision": precision, "holds": holds} for engine, precision, holds in names]
    chosen = {"engine": "onnxruntime", "precision": "FP32"}
    data.write(
        place.results / "reviews" / "a-cpu",
        "choice",
        data.record(data.classifier(), rows=choice, chosen=chosen, texts="a.txt"),
    )
    written(place)
    text = (place.results / "reviews" / "a-cpu" / "tables.md").read_text()
    assert "hold on 64 texts and in the choice above, these serve reviews best here:" in text
    assert "| OpenVINO, INT8 | 125.0" not in text and "ONNX Runtime, FP32 | 50.0: no other is better |" in text


def test_what_a_service_survived_is_counted_by_outcome(place):
    place.text.write_text(data.TEXT + "\n<!-- begin survived -->\nold\n<!-- end survived -->\n")
    assert "Not measured." in block(written(place), "survived")
    data.write_survival(place.results / "reviews" / "a-cpu", data.classifier())
    text = block(written(place), "survived")
    assert "| reviews, INT8 | 30 | 800 / 0 / 0 | 199 / 1 | 400 / 401 | +1.5 ± 2.0 |" in text
    assert "does not always answer again when a process is killed or stopped (2 kinds of fault)" in text
    assert (
        "400 clients at once for 30 s got these answers: 5 refused, 9 right; the p99 of the right ones was 1.2 s"
        in text
    )
    assert "got 63 requests/s through 1 kinds of fault: of 300 requests, 1 were lost and 2 answered wrongly" in text
    tables = (place.results / "reviews" / "a-cpu" / "tables.md").read_text()
    assert "12.3 s after the server got SIGKILL and never after the guard" in tables
    assert "| one hangs | HTTP | asked once | 200 | 1 | 2 | 0.50 | 4.00 |" in tables
    assert "## What it survived" in tables and "+1.5 ± 2.0" in tables


# --- peers and targets ---------------------------------------------------------------


def test_wrong_answers_of_what_is_shown_and_every_target_stand_in_the_report(place):
    place.text.write_text(data.TEXT + "\n<!-- begin peers -->\nold\n<!-- end peers -->\n")
    folder, model = place.results / "reviews" / "a-cpu", data.classifier()
    answers = {"right": 50, "failed": 0, "wrong_label": 1, "wrong_score": 9}
    level = {"texts_per_s": {"median": 90.0}, "ratio": {"median": 1.0, "min": 0.9, "max": 1.1}, "answers": answers}
    level |= {"latency_p50_ms": 9.0, "latency_p99_ms": None, "cpu_ms_per_text": 1.0, "mean_batch_size": 1.0}
    own = {"name": "project", "kind": "project", "executed_by": "ONNX Runtime, FP32, packed, 2 cores", "start_s": [2.0]}
    own |= {"levels": {"8": level}, "versions": {}, "settings": "", "memory_idle_mib": 250.0}
    settings = {"texts": {"file": "a.tsv", "count": 9}, "concurrency": [8], "requests": [60], "rounds": 5}
    settings |= {"base": "project", "score_tolerance": 0.001}
    data.write(folder, "peers", data.record(model, systems=[own], settings=settings, windows=[], embeddings=[]))
    said = "Of its 60 answers, project (ONNX Runtime, FP32) gave 1 with another label and 9 with another score (by more than 0.001)"
    assert said in block(written(place), "peers")
    facts = {
        "services": [],
        "roofs_flops_per_s": {"FP32": 1e9},
        "flops_per_text": 1e9,
        "texts": {"file": "a", "count": 9},
    }
    data.write(folder, "limits", data.record(model, settings={"rounds": 1, "overload": 64}, **facts))
    data.write_length(folder, model, (1.0, 8.96), (1.0, 10.0))
    text = block(written(place), "peers")
    assert "Of the 36 targets of reviews, 2 are met; bold figures miss theirs." in text
    assert (
        "| FP32 / the chosen: s from start to first answer / MiB idle | ≤ 3 / 300 | 2.00 / 250.00; not measured |"
        in text
    )
    assert "| FP32 ÷ a server that batches by hand | ≥ 1 / 1.4 / 1.5 | not measured |" in text
    # two decimals would say that it is met
    assert "| growth of a text's time ÷ of its FLOPs | 0.9 to 1.1 | **0.896** |" in text
