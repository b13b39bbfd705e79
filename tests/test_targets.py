"""The table of targets: each row of made-up records, and bench.limits on the service of a tiny classifier."""

import json

import pytest
import report_data as data
from conftest import run_here

from bench import limits, processes, roofs
from core.engines import why_missing
from reporting import measures, targets

ANSWERS = {"right": 9, "failed": 0, "wrong_label": 0, "wrong_score": 0}


def system(name, kind, speeds, p99=40.0, **facts):
    levels = {
        str(c): {"texts_per_s": {"median": s}, "answers": ANSWERS, "latency_p99_ms": p99, "mean_batch_size": c / 4}
        for c, s in zip((1, 8, 32), speeds, strict=True)
    }
    return {"name": name, "kind": kind, "levels": levels} | facts


def service(engine, precision, speed, ratio):
    middle = {"median": ratio, "min": ratio, "max": ratio}
    bare = {"median": speed, "min": speed, "max": speed}
    level = {"served_to_bare": middle, "bare_texts_per_s": bare, "texts_per_s": bare, "mean_batch_size": 7.5, "positions_per_token": 1.25}  # fmt: skip
    over = {"to_best_level": middle, "texts_per_s": bare, "failed": 0}
    return {"engine": engine, "precision": precision, "levels": {c: level for c in ("1", "8", "32")}, "overload": over}


@pytest.fixture
def model():
    """A classifier for which BF16 was chosen, with everything measured."""
    systems = [
        system("project", "project", (100, 200, 300), executed_by="ONNX Runtime, FP32, packed, 2 cores", start_s=[2.0, 4.0], memory_idle_mib=250.0),
        system("BF16", "named by the user", (150, 400, 900), 20.0, executed_by="OpenVINO, BF16, packed, 2 cores", start_s=[2.5], memory_idle_mib=310.0),
        system("INT8", "named by the user", (140, 300, 360), executed_by="OpenVINO, INT8, padded, 2 cores"),
        system("ensemble", "named by the user", (100, 100, 100), executed_by=processes.MODEL_BY_MODEL),
        system("peer", "published", (50, 100, 200), 80.0),
        system("queue", "by hand", (100, 100, 100)),
    ]  # fmt: skip
    windows = [
        {"system": s["name"], "round": 1, "concurrency": int(c), "texts_per_s": level["texts_per_s"]["median"]}
        for s in systems
        for c, level in s["levels"].items()
    ]
    names = (
        "project",
        f"sentence-transformers: {measures.ONNX}",
        *(f"sentence-transformers: {n}" for n in measures.OPENVINO),
    )
    rows = [{"name": n, "texts_per_s": {"median": v}} for n, v in zip(names, (200, 100, 150, 250), strict=True)]
    agreements = {"INT8": 0.995, "BF16": 0.999}
    choice = [
        {"engine": "openvino", "precision": p, "agreement": {"value": a}, "together_texts_per_s": 9.0}
        for p, a in agreements.items()
    ]
    return {
        "peers": {"systems": systems, "windows": windows, "embeddings": rows, "settings": {"base": "project"}},
        "choice": {"rows": choice, "chosen": {"engine": "openvino", "precision": "BF16"}},
        "limits": {
            "services": [service("onnxruntime", "FP32", 250.0, 0.9), service("openvino", "BF16", 500.0, 0.7), service("openvino", "INT8", 800.0, 0.8)],
            "roofs_flops_per_s": {"FP32": 200e9, "BF16": None, "INT8": 800e9}, "flops_per_text": 0.5e9,
        },
        "length": {"rows": [{"tokens": n, "flops": f, "seconds": {"median": s}} for n, f, s in ((64, 1, 1), (512, 10, 8))]},
    }  # fmt: skip


EXPECTED = {
    "the chosen engine and precision ÷ the best published peer": ("3.00 / 4.00 / 4.50", "yes"),
    "FP32 ÷ the best published peer": ("2.00 / 2.00 / 1.50", "yes / yes / no"),
    "FP32 ÷ a server that batches by hand": ("1.00 / 2.00 / 3.00", "yes"),
    "FP32: served ÷ bare": ("0.90 / 0.90 / 0.90", "yes"),
    "the chosen: served ÷ bare": ("0.70 / 0.70 / 0.70", "no"),
    "INT8 with an agreement": ("1.40 / 3.00 / 3.60", "yes / yes / no"),
    "mean executed batch": ("0.25 / 2.00 / 8.00", "no / no / yes"),
    "FP32 / the chosen: positions computed": ("1.25 / 1.25", "no"),
    "FP32: p99": ("0.50", "yes"),
    "the chosen: p99": ("0.25", "yes"),
    "bare FP32": ("0.62", "no"),
    "bare INT8": ("0.50", "yes"),
    "sentence embeddings": ("2.00 / 0.80", "yes / no"),
    "FP32: s from": ("3.00 / 250.00", "yes"),
    "the chosen: s from": ("2.50 / 310.00", "yes / no"),
    "FP32: throughput at overload": ("0.90", "no"),
    "the chosen: throughput at overload": ("0.70", "no"),
    "growth of a text's time": ("0.80", "no"),
}


def test_every_target_is_computed_from_its_record(model):
    found = [targets.row(target, model) for target in targets.TARGETS]
    assert len(found) == len(EXPECTED)
    for row, (what, (measured, met)) in zip(found, EXPECTED.items(), strict=True):
        assert row["what"].startswith(what) and (row["measured"], row["met"]) == (measured, met), row


def test_a_speed_is_shown_as_if_serving_cost_nothing(model):
    fp32 = model["limits"]["services"][0]["levels"]["1"]
    fp32 |= {
        "bare_texts_per_s": {"median": 250.0},
        "refused_ms": {"median": 0.5},
        "in_process_ms": {"median": 4.5},
    }
    shown = [row["at best"] for row in (targets.row(target, model) for target in targets.TARGETS)]
    assert shown[:3] == ["4.29 / 5.71 / 6.43", "2.22 / 2.22 / 1.67", "1.11 / 2.22 / 3.33"]
    assert shown[3] == "0.80 / – / –"
    assert shown[5] == "1.75 / 3.75 / 4.50" and not any(shown[4:5] + shown[6:])


def test_the_report_counts_what_is_met(model):
    (text,) = targets.summary([model | {"title": "reviews", "slug": "reviews", "machine": "a-cpu"}])
    met = sum(
        targets.met(v, *ends) == "yes"
        for t in targets.TARGETS
        for v, ends in zip(t.measure(model), t.bounds, strict=True)
    )
    assert text.startswith(f"Of the 36 targets of reviews, {met} are met") and 0 < met < 36


def test_what_has_no_record_is_not_measured(model):
    for row in (targets.row(target, dict.fromkeys(model)) for target in targets.TARGETS):
        assert row["measured"] == row["met"] == "not measured", row
    model["choice"]["rows"][0]["agreement"]["value"] = 0.993
    assert targets.row(targets.TARGETS[5], model)["met"] == "not measured"


def test_limits_of_a_tiny_service_are_measured_and_shown(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "BUILD", tmp_path / "bench")
    monkeypatch.setattr(roofs, "ROOF_SIZES", (64,))
    given = ("--model", tiny.checkpoint, "--repository", tiny.repository, "--results", tmp_path / "results")
    options = ("--concurrency", 1, 4, "--requests", 8, 16, "--overload-requests", 32, "--rounds", 2)
    more = ("--service", "openvino,BF16") if why_missing("openvino") else ()
    done = run_here(limits, *given, *options, *more)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("results/*/*/limits.json")
    record = json.loads(path.read_text())
    (fp32, *others) = record["services"]
    assert fp32["executed_by"].startswith("ONNX Runtime, FP32, packed")
    assert all("pip install" in row["error"] for row in others)
    for level in fp32["levels"].values():
        assert level["positions_per_token"] == 1 and level["served_to_bare"]["median"] > 0
    alone = fp32["levels"]["1"]
    assert 0 < alone["refused_ms"]["median"] < 1000 and 0 < alone["in_process_ms"]["median"] < 1000
    assert "refused_ms" not in fp32["levels"]["4"]
    assert fp32["overload"]["to_best_level"]["median"] > 0 and fp32["overload"]["failed"] == 0
    assert record["roofs_flops_per_s"]["FP32"] > 0 and record["roofs_flops_per_s"]["INT8"] > 0
    place = data.make_place(tmp_path / "report")
    place.results = tmp_path / "results"
    data.written(place)
    tables = path.with_name("tables.md").read_text()
    assert "| ONNX Runtime, FP32 | 4 |" in tables and "÷ the best level" in tables


@pytest.mark.parametrize("wrong", [("--service", "triton,FP32"), ("--requests", 1), ("--rounds", 0)])
def test_bad_usage(tiny, wrong):
    done = run_here(limits, "--model", tiny.checkpoint, "--repository", tiny.repository, *wrong)
    assert done.returncode == 2
