"""report.py: only marked blocks change, stale texts fail, labels are honest."""

import json
import shutil

import pytest
from conftest import ROOT, run, run_here, succeed

EMBEDDERS = ("ONNX", "TRT_FP32", "TRT_FP16", "TRT_INT8", "TRT_BEST")
PERF_ROW = {
    "throughput_infer_per_s": 50.0,
    "latency_mean_ms": 20.0,
    "latency_p50_ms": 19.0,
    "latency_p90_ms": 21.0,
    "latency_p95_ms": 22.0,
    "latency_p99_ms": 23.0,
    "server_queue_ms": 0.1,
    "server_compute_ms": 18.0,
    "mean_batch_size": 1.0,
    "batch_size": 1,
    "spread_percent": 3.0,
    "stable": True,
    "served_to_bare": 0.9,
}
TEXT = "# Title\n\nprose 12.5\n\n<!-- begin results -->\nold\n<!-- end results -->\n\n<!-- begin performance -->\n<!-- end performance -->\n"


@pytest.fixture
def place(quality, chain, tmp_path):
    """Results of a real run and a report of one's own."""
    shutil.copytree(chain.results, tmp_path / "results")
    (tmp_path / "report.md").write_text(TEXT)
    return tmp_path


def report(place, *options):
    return run("report.py", "--results", place / "results", "--report", place / "report.md", *options)


def test_blocks_are_filled_and_prose_is_kept(place):
    assert report(place).returncode == 0
    text = (place / "report.md").read_text()
    assert text.startswith("# Title\n\nprose 12.5\n") and "old" not in text
    assert "| TRT_INT8 | ONNX Runtime, CPU |" in text
    assert "not measured" in text  # there is no perf.json


def test_check_passes_on_current_and_fails_on_changed_text_data_or_picture(place):
    assert report(place, "--check").returncode == 1
    assert report(place).returncode == 0
    assert report(place, "--check").returncode == 0
    text = (place / "report.md").read_text()
    (place / "report.md").write_text(text.replace("TRT_INT8", "TRT_INT9"))
    assert report(place, "--check").returncode == 1
    (place / "report.md").write_text(text)
    data = place / "results/all-MiniLM-L6-v2/quality.csv"
    data.write_text(data.read_text() + "more,TRT_INT8,1,1,1,1,1,1,\n")
    done = report(place, "--check")
    assert done.returncode == 1 and "quality.png" in done.stderr


def test_a_lost_marker_is_an_error(place):
    (place / "report.md").write_text(TEXT.replace("<!-- end results -->", ""))
    done = report(place)
    assert done.returncode == 1 and "restore the markers" in done.stderr
    assert "old" in (place / "report.md").read_text()


def write_perf(place, engines, rows):
    folder = place / "results/all-MiniLM-L6-v2"
    quality = json.loads((folder / "quality.json").read_text())
    record = {key: quality[key] for key in ("model", "environment")}
    record |= {"server": quality["server"] | {"engines": engines}, "quick": False, "rows": rows}
    record["bare_infer_per_s"] = {"TRT_FP16": {"1": 55.0, "8": 56.0}}
    record["settings"] = {
        "protocol": "grpc",
        "stability_percent": 10,
        "window_s": 3,
        "windows": 3,
        "batch_size": 1,
        "inputs": "texts",
    }
    record |= {"planned": [[row["model"], row["concurrency"]] for row in rows], "server_memory_mib": 900.0}
    (folder / "perf.json").write_text(json.dumps(record))


def test_speeds_of_a_cpu_are_never_shown_as_those_of_tensorrt(place):
    engines = dict.fromkeys(EMBEDDERS, "ONNX Runtime, CPU")
    rows = [
        {"model": "TRT_FP16", "concurrency": 1, **PERF_ROW},
        {"model": "TRT_INT8", "concurrency": 1, "error": "called by others"},
    ]
    write_perf(place, engines, rows)
    assert report(place).returncode == 0
    text = (place / "report.md").read_text()
    assert "no conclusion about TensorRT" in text
    assert "| TRT_FP16 | 1 | 50.0 | 0.90 |" in text
    assert "| TRT_INT8 | 1 | refused: called by others |" in text
    assert "| TRT_FP16 | ONNX Runtime, CPU | **50.0** |" in text


def test_an_unstable_level_is_marked_in_the_report(place):
    engines = dict.fromkeys(EMBEDDERS, "ONNX Runtime, CPU")
    row = {"model": "ONNX", "concurrency": 1, **PERF_ROW, "stable": False, "spread_percent": 31.0}
    write_perf(place, engines, [row])
    assert report(place).returncode == 0
    assert "| no, 31 % |" in (place / "report.md").read_text()


def test_measurements_of_two_exports_are_not_put_together(place):
    write_perf(place, dict.fromkeys(EMBEDDERS, "ONNX Runtime, CPU"), [{"model": "ONNX", "concurrency": 1, **PERF_ROW}])
    path = place / "results/all-MiniLM-L6-v2/perf.json"
    record = json.loads(path.read_text())
    record["model"]["reference_sha256"] = "0" * 64
    path.write_text(json.dumps(record))
    done = report(place)
    assert done.returncode == 0 and "of another export" in done.stderr
    assert "| ONNX | ONNX Runtime, CPU | reference | reference | not measured |" in (place / "report.md").read_text()


def test_quality_of_a_cpu_beside_speed_of_a_gpu_is_told_apart(place):
    engines = {"ONNX": "ONNX Runtime, GPU"} | {s: "TensorRT, GPU" for s in EMBEDDERS if s != "ONNX"}
    write_perf(place, engines, [{"model": "TRT_FP16", "concurrency": 1, **PERF_ROW}])
    assert report(place).returncode == 0
    text = (place / "report.md").read_text()
    assert "| TRT_FP16 | quality: ONNX Runtime, CPU; perf: TensorRT, GPU |" in text
    assert "TensorRT on a GPU: measured for all-MiniLM-L6-v2" in text and "no conclusion" not in text


def test_a_level_that_a_cut_off_run_did_not_reach_is_not_measured(place):
    write_perf(place, dict.fromkeys(EMBEDDERS, "ONNX Runtime, CPU"), [])
    path = place / "results/all-MiniLM-L6-v2/perf.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"planned": [["TRT_BEST", 32]]}))
    assert report(place).returncode == 0
    assert "| TRT_BEST | 32 | not measured |" in (place / "report.md").read_text()


def test_a_model_with_nothing_but_a_compile_check_is_shown(place):
    folder = place / "results/all-MiniLM-L6-v2"
    quality = json.loads((folder / "quality.json").read_text())
    for name in ("quality.json", "quality.csv"):
        (folder / name).unlink()
    rows = [{"graph": "ONNX", "architecture": "SM86", "error": None, "seconds": 1.0}]
    record = {key: quality[key] for key in ("model", "environment")} | {"tensorrt_rtx": "1", "rows": rows}
    (folder / "compile.json").write_text(json.dumps(record))
    done = report(place)
    assert done.returncode == 0, done.stderr
    assert "| ONNX | not measured | reference |" in (place / "report.md").read_text()


def test_broken_or_missing_results_are_named(place):
    (place / "results/all-MiniLM-L6-v2/quality.json").write_text('{"half')
    done = report(place)
    assert done.returncode == 1 and "quality.json" in done.stderr and "Traceback" not in done.stderr
    shutil.rmtree(place / "results")
    done = report(place)
    assert done.returncode == 1 and "run ./run.sh" in done.stderr


def test_committed_report_is_what_the_committed_data_gives():
    succeed("report.py", "--check", cwd=ROOT)


@pytest.fixture
def verdicts_place(tiny, tmp_path):
    """A study in process of a tiny classifier, and a report of one's own with its block."""
    import verdicts

    data = tmp_path / "data.tsv"
    data.write_text("text\tlabel\n" + "".join(f"text number {i}\t{i % 2}\n" for i in range(40)))
    options = ("--model", tiny.checkpoint, "--repository", tiny.repository, "--data", data, "--precision", 0.1)
    done = run_here(verdicts, *options, "--results", tmp_path / "results", "--resamples", 50)
    assert done.returncode == 0, done.stderr
    (tmp_path / "report.md").write_text(
        "<!-- begin verdicts -->\n<!-- end verdicts -->\n\n<!-- begin results -->\n<!-- end results -->\n"
    )
    return tmp_path


def test_verdicts_are_shown_with_their_conclusion_and_not_among_the_embedders(verdicts_place):
    assert report(verdicts_place).returncode == 0
    text = (verdicts_place / "report.md").read_text()
    verdicts, results = text.split("<!-- begin results -->")
    assert "### tiny-checkpoint" in verdicts and "**Conclusion: " in verdicts and "verdicts.png" in verdicts
    assert "tiny-checkpoint" not in results
    assert report(verdicts_place, "--check").returncode == 0


def test_where_a_classifier_comes_from_is_said_where_it_is_known(verdicts_place):
    assert report(verdicts_place).returncode == 0
    assert "Trained on" not in (verdicts_place / "report.md").read_text()
    record = {"data": "data.tsv", "texts": 90, "accuracy": 0.875, "eval_texts": 40, "seconds": 61.2}
    (verdicts_place / "results/tiny-checkpoint/training.json").write_text(json.dumps(record))
    assert report(verdicts_place, "--check").returncode == 1
    assert report(verdicts_place).returncode == 0
    found = "Trained on data.tsv: 90 texts, dev accuracy 0.8750 on 40 texts, 61 s."
    assert found in (verdicts_place / "report.md").read_text()


def test_a_changed_study_makes_text_and_picture_stale(verdicts_place):
    assert report(verdicts_place).returncode == 0
    path = verdicts_place / "results/tiny-checkpoint/verdicts.json"
    record = json.loads(path.read_text())
    record["conclusion"]["text"] = "another"
    path.write_text(json.dumps(record))
    done = report(verdicts_place, "--check")
    assert done.returncode == 1 and "verdicts.png" in done.stderr and "report.md" in done.stderr


def test_without_a_study_verdicts_are_not_measured(place):
    (place / "report.md").write_text("<!-- begin verdicts -->\n<!-- end verdicts -->\n")
    assert report(place).returncode == 0
    assert "Verdicts of a classifier: not measured." in (place / "report.md").read_text()
