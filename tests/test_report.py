"""report.py: only marked blocks change, stale texts and pictures fail, each model and machine has its tables."""

import json
import shutil
import time

import pytest
import report_data as data
from conftest import ROOT, run, succeed
from report_data import block, report, written

from reporting import findings, markdown

TEXT = data.TEXT


@pytest.fixture
def place(tmp_path):
    """Deviations of an encoder on one machine, and a report of one's own."""
    return data.make_place(tmp_path)


# --- blocks and gates ----------------------------------------------------------------


def test_blocks_are_filled_and_prose_is_kept(place):
    text = written(place)
    assert text.startswith("# Title\n\nprose 12.5\n") and "\nold\n" not in text
    assert "| TRT_INT8 | ONNX Runtime, CPU | 6.0% |" in block(text, "results")
    assert "against concurrency: not measured." in block(text, "embedders")


def test_check_passes_on_current_and_fails_on_changed_text_data_or_picture(place):
    assert report(place, "--check").returncode == 1
    written(place)
    assert report(place, "--check").returncode == 0
    for path in (place.text, place.folder / "tables.md"):
        text = path.read_text()
        path.write_text(text.replace("TRT_INT8", "TRT_INT9"))
        done = report(place, "--check")
        assert done.returncode == 1 and path.name in done.stderr
        path.write_text(text)
    csv = place.folder / "quality.csv"
    csv.write_text(csv.read_text() + "more,TRT_INT8,1,1,1,1,1,1,\n")
    done = report(place, "--check")
    assert done.returncode == 1 and "quality.png" in done.stderr


def test_check_fails_on_a_picture_that_older_drawing_code_made(place, monkeypatch):
    from reporting import pictures

    written(place)
    older = place.results.parent / "code"
    older.mkdir()
    (older / "pictures.py").write_text("# other code\n")
    monkeypatch.setattr(pictures, "__file__", str(older / "pictures.py"))
    done = report(place, "--check")
    assert done.returncode == 1 and "quality.png" in done.stderr and "tables.md" not in done.stderr


def test_check_writes_nothing(place):
    report(place, "--check")
    assert place.text.read_text() == TEXT and not (place.folder / "tables.md").exists()


@pytest.mark.parametrize("change", [("<!-- end results -->", ""), ("begin results", "begin outcome")])
def test_a_lost_or_unknown_marker_is_an_error(place, change):
    place.text.write_text(TEXT.replace(*change))
    done = report(place)
    assert done.returncode == 1 and ("restore the markers" in done.stderr or "correct the marker" in done.stderr)
    assert "old" in place.text.read_text()


def test_broken_missing_or_older_results_are_named(place):
    quality = place.folder / "quality.json"
    whole = quality.read_text()
    quality.write_text('{"half')
    done = report(place)
    assert done.returncode == 1 and "quality.json" in done.stderr and "Traceback" not in done.stderr
    quality.write_text(whole)
    older = place.folder.parent / "perf.json"
    older.write_text("{}")
    done = report(place)
    assert done.returncode == 1 and str(older) in done.stderr and "older version" in done.stderr
    shutil.rmtree(place.results)
    done = report(place)
    assert done.returncode == 1 and "run ./run.sh" in done.stderr


def test_help_answers_at_once():
    started = time.perf_counter()
    assert run("report.py", "-h").returncode == 0
    assert time.perf_counter() - started < 3  # it takes a quarter of a second; matplotlib alone is slower


@pytest.mark.skipif(any((ROOT / "results").glob("*/*.json")), reason="the results are of an older layout")
def test_committed_report_is_what_the_committed_data_gives():
    succeed("report.py", "--check", cwd=ROOT)


def test_committed_report_fits_its_size():
    assert (ROOT / "report.md").stat().st_size < 25_000
    assert (ROOT / "README.md").stat().st_size < 12_288


# --- which measurements stand together -----------------------------------------------


def test_measurements_of_two_exports_are_not_put_together(place):
    data.write_perf(place.folder, data.card(reference_sha256="0" * 64), [data.level("ONNX", 50.0)])
    done = report(place)
    assert done.returncode == 0 and "of another export" in done.stderr
    assert "| ONNX | ONNX Runtime, CPU | reference | reference | not measured |" in place.text.read_text()


def test_of_two_machines_one_is_shown_and_the_other_has_its_own_tables(place):
    other = place.folder.with_name("b-gpu")
    data.write_quality(other, place.model, engines=data.GPU)
    text = block(written(place), "results")
    assert text.count("**all-MiniLM-L6-v2**. A CPU") == 1
    assert "Other machines measured [all-MiniLM-L6-v2](results/all-MiniLM-L6-v2) too." in text
    assert all("## Deviations" in (folder / "tables.md").read_text() for folder in (place.folder, other))


def test_of_two_machines_without_a_gpu_the_newest_with_speeds_is_shown(place):
    data.write_perf(place.folder, place.model, [data.level("ONNX", 50.0)])
    data.write_sensitivity(place.folder, place.model)
    for name, month, kind in (("b-cpu", "02", "perf"), ("c-cpu", "03", "quality")):  # newer, with fewer kinds
        folder = place.folder.with_name(name)
        shutil.copytree(place.folder, folder, ignore=lambda _, names, kind=kind: [n for n in names if kind not in n])
        record = json.loads((folder / f"{kind}.json").read_text())
        record["environment"] |= {"utc": f"2026-{month}-01T00:00:00+00:00", "cpu": f"CPU {name}"}
        data.write(folder, kind, record)
    text = block(written(place), "results")
    assert "**all-MiniLM-L6-v2**. CPU b-cpu; 2026-02-01" in text


def test_the_model_of_record_is_distilbert_and_its_random_weights_are_said(place):
    assert "in the place of distilbert-base-uncased" in block(written(place), "results")
    random = data.card(**data.OF_RECORD)
    data.write_quality(place.results / "distilbert-base-uncased-random" / "a-cpu", random)
    text = block(written(place), "results")
    assert "The model of record is **distilbert-base-uncased (random weights)**" in text and "seed 0" in text
    assert text.index("**distilbert-base-uncased (random weights)**. A CPU") < text.index("**all-MiniLM-L6-v2**. A CPU")
    assert "Search for INT8" not in text


def test_a_model_with_nothing_but_a_compile_check_is_shown(place):
    (place.folder / "quality.json").unlink()
    rows = [{"graph": "ONNX", "architecture": "SM86", "error": None, "seconds": 1.0}]
    rows += [{"graph": "TRT_INT8", "architecture": "SM86", "error": "no kernel", "seconds": 1.0}]
    data.write(place.folder, "compile", data.record(place.model, tensorrt_rtx="1.7", rows=rows))
    text = written(place)
    assert "| ONNX | not measured | reference |" in text
    assert "1 of 2 pairs" in text and "Refused: TRT_INT8 for SM86: no kernel." in text


# --- what was executed, and findings -------------------------------------------------


def test_what_was_never_executed_follows_the_records(place):
    text = block(written(place), "executed")
    for what in ("anything on a GPU", "TensorRT plans", "Docker", "hub", "MLflow", "with its own weights"):
        assert what in text.split("never executed")[1]
    data.write_quality(place.folder, data.card(name="distilbert-base-uncased", source="hub: d"), engines=data.GPU)
    quality = json.loads((place.folder / "quality.json").read_text())
    quality["server"]["version"] = "2.69.0"
    quality["environment"]["gpu"] = {"name": "Tesla T4", "driver": "1", "compute_capability": "7.5"}
    data.write(place.folder, "quality", quality)
    never = block(written(place), "executed").split("never executed")[1]
    for what in ("anything on a GPU", "TensorRT plans", "Docker", "hub", "with its own weights"):
        assert what not in never
    assert "MLflow" in never


def test_machines_and_engines_are_named_in_few_words():
    facts = {"cores": 2, "memory_gib": 8.0, "gpu": None}
    cpus = (
        "EPYC",
        "EPYC, family 25, model 17",
        "EPYC, family 25, model 1",
        "EPYC, family 26, model 2",
        "Xeon 9 @ 2 GHz",
    )
    found = findings.named_machines([facts | {"cpu": cpu} for cpu in cpus])
    rest = "2 cores, 8.0 GiB, no GPU"
    assert found == f"EPYC (family 25, models 1 and 17; family 26, model 2; {rest}) and Xeon 9 @ 2 GHz ({rest})"
    engines = {
        "OpenVINO, CPU, BF16",
        "OpenVINO, CPU",
        "ONNX Runtime, CPU",
        "ONNX Runtime, CPU, emulated",
        "TensorRT, GPU",
    }
    assert findings.named_engines(engines) == "ONNX Runtime and OpenVINO (CPU) and TensorRT (GPU)"


def test_a_share_is_called_all_only_where_it_is_all():
    assert [markdown.share(value) for value in (1, 0.99996, 0.9809, 0)] == ["100.0%", "99.9%", "98.1%", "0.0%"]


def test_findings_are_of_the_data_and_missing_ones_say_so(place):
    text = block(written(place), "findings")
    assert text.count("not measured") == 3 and "0.10% in FP16 and 0.20% in FP32 as TF32 (emulated)" in text
    data.write_complexity(place.folder, place.model)
    data.write_sensitivity(place.folder, place.model)
    data.write_perf(place.folder, place.model, [data.level(m, s, 8) for m, s in (("ONNX", 50.0), ("TRT_INT8", 80.0))])
    reviews = data.classifier()
    data.write_verdicts(place.results / "reviews" / "a-cpu", reviews)
    text = block(written(place), "findings")
    assert "not measured" not in text
    assert "6.0% in INT8 and 5.0% in BEST, with 95.0% of the FLOPs" in text
    assert "TRT_INT8 1.60" in text and "say nothing about TensorRT" in text
    assert "300 µs in INT8 and 100 µs in BEST" in text and "above FP16's" in text
    assert "for ONNX; it is not shown for TRT_INT8" in text


def test_without_an_emulation_of_tf32_there_is_no_row_of_it(place):
    assert "FP32 as TF32 (emulated)" in written(place)
    data.write_quality(place.folder, place.model, tf32=None)
    assert "FP32 as TF32 (emulated)" not in written(place)
