"""report.py: what each section says of speed, of what bounds a layer, and of verdicts."""

import json

import pytest
import report_data as data
from report_data import block, report, written


@pytest.fixture
def place(tmp_path):
    """Deviations of an encoder on one machine, and a report of one's own."""
    return data.make_place(tmp_path)


# --- speed ---------------------------------------------------------------------------


def test_speeds_of_a_cpu_are_never_shown_as_those_of_tensorrt(place):
    rows = [data.level("TRT_FP16", 50.0), {"model": "TRT_INT8", "concurrency": 1, "error": "called by others"}]
    data.write_perf(place.folder, place.model, rows)
    text = block(written(place), "embedders")
    assert "no conclusion about TensorRT" in text and "| TRT_INT8 | refused |" in text
    tables = (place.folder / "tables.md").read_text()
    assert "| TRT_FP16 | 1 | 50.0 | 400 | 0.90 |" in tables and "| TRT_INT8 | 1 | called by others |" in tables


def test_the_noise_is_that_of_the_replicate_and_nothing_inside_it_is_bold(place):
    speeds = {"ONNX": 50.0, "TRT_FP32": 45.0, "TRT_FP16": 54.0, "TRT_INT8": 100.0}
    rows = [data.level(m, s, 8) for m, s in speeds.items()] + [data.level(m, 50.0) for m in speeds]
    data.write_perf(place.folder, place.model, rows)
    text = written(place)
    assert "0.90 to 1.00 for throughput" in text and "within a factor of 1.11" in text
    assert "| TRT_INT8 | 50.0 (49.0 to 51.0) | **100.0** (99.0 to 101.0) |" in text
    assert "TRT_FP16 1.08 (within the noise)" in text
    data.write_perf(place.folder, place.model, [r for r in rows if r["model"] != "TRT_INT8"])
    assert "**54.0**" not in written(place)


def test_on_a_gpu_the_fp32_plan_is_no_replicate(place):
    data.write_perf(place.folder, place.model, [data.level(m, 50.0) for m in ("ONNX", "TRT_FP32")], engines=data.GPU)
    text = written(place)
    assert "No model was measured twice" in text and "within a factor of 1.03" in text
    assert "no conclusion about TensorRT" not in text
    assert "| TRT_FP32 | quality: ONNX Runtime, CPU; perf: TensorRT, GPU |" in text


def test_a_p99_of_few_requests_is_not_shown(place):
    data.write_perf(place.folder, place.model, [data.level("ONNX", 50.0, n=144, latency_p99_ms=None)])
    text = written(place)
    assert "| ONNX | 19.0 / –; 144 |" in text and "None" not in text


def test_an_unstable_and_an_unmeasured_level_are_marked(place):
    rows = [data.level("ONNX", 50.0, stable=False, spread_percent=31.0)]
    data.write_perf(place.folder, place.model, rows, planned=[["TRT_BEST", 1]])
    text = block(written(place), "embedders")
    assert "| ONNX | 50.0 (49.0 to 51.0), unstable |" in text and "| TRT_BEST | not measured |" in text
    rows.append(data.level("ensemble", 2000.0, 8))
    data.write_perf(place.folder, place.model, rows, planned=[["TRT_BEST", 1]])
    text = block(written(place), "embedders")  # what nobody planned is blank
    assert "| ONNX | 50.0 (49.0 to 51.0), unstable |  |" in text and "| ensemble |  | 2000 (1999 to 2001) |" in text
    tables = (place.folder / "tables.md").read_text()
    assert "| no, 31% |" in tables and "| TRT_BEST | 1 | not measured |" in tables


def test_rates_stand_in_the_tables(place):
    rates = [data.rate(42.0, 97.5, share=0.3), data.rate(70.0, 0, share=0.5) | {"error": "called by others"}]
    data.write_perf(place.folder, place.model, [data.level("ONNX", 50.0)], rates=rates)
    assert "Poisson" not in written(place)
    tables = (place.folder / "tables.md").read_text()
    assert "| ensemble | 42.0 | 30% | 42.0 | 400 | 0 | 19.0 | 22.0 | 97.5 | 0.1 | 1.00 | yes |" in tables
    assert "| ensemble | 70.0 | 50% | called by others |" in tables


def test_what_padding_costs_is_shown_where_both_lengths_were_measured(place):
    dynamic = place.folder.parent.with_name("all-MiniLM-L6-v2-dynamic") / place.folder.name
    model = data.card(fixed_length=False, outputs={"EMBEDDING": [-1, 2]}, reference_sha256="f" * 64)
    data.write_perf(place.folder, place.model, [data.level(m, 50.0, c) for m in ("ONNX", "tokenizer") for c in (1, 8)])
    rows = [data.level("ONNX", 100.0), data.level("ONNX", 150.0, 8), data.level("TRT_INT8", 9.0)]
    data.write_perf(dynamic, model, [*rows, data.level("tokenizer", 500.0)])
    text = written(place)
    results = block(text, "results")
    assert (
        "Without padding (at dynamic length), the throughput of its embedders is 2.00 to 3.00 times as high" in results
        and "at dynamic length**" not in text
    )
    tables = (dynamic / "tables.md").read_text()
    assert "of all-MiniLM-L6-v2, where every text is padded to 128 tokens" in tables
    assert "| ONNX | 2.00 | 3.00 |" in tables and "| tokenizer | 10.00 | not measured |" in tables
    assert "TRT_INT8 | 9" not in tables.split("padded to")[1]
    (place.folder / "perf.json").unlink()
    assert "At dynamic length: not measured." in written(place)


def test_why_best_is_slow_on_a_cpu_is_said_where_it_is(place):
    for speed, engines, said in ((20.0, data.CPU, True), (49.0, data.CPU, False), (20.0, data.GPU, False)):
        rows = [data.level("ONNX", 50.0), data.level("TRT_BEST", speed)]
        data.write_perf(place.folder, place.model, rows, engines=engines)
        written(place)
        assert ("TRT_BEST reaches 0.40 to 0.40 of ONNX's" in (place.folder / "tables.md").read_text()) is said


# --- layers and MatMuls --------------------------------------------------------------


def test_equal_layers_are_one_row_and_those_without_threshold_too(place):
    data.write_complexity(place.folder, place.model)
    text = block(written(place), "complexity")
    assert "| Q, K, V | 3 (2.40) | 3 (2.40) | 3 (2.40) | 3 (2.40) |" in text  # T4 has no TF32: no column of it
    assert "| GELU, softmax | never | never | never | never |" in text
    bound = text.split("| bound by arithmetic (all others: by memory) |")[1].split("\n\n")[0]
    assert bound.endswith("| Q, K, V |") and "GELU" not in bound and "complexity.png" in text
    assert "| INT8 | 300 | 300 |" in text and "| BEST | 100 | 100 |" in text


def test_matmuls_stand_in_the_tables_of_their_model_alone(place):
    data.write_sensitivity(place.folder, place.model)
    text = written(place)
    assert "layer.1/MatMul" not in text and "sensitivity.png" in text and "| 96 + 32 | 95.0% |" in text
    assert "| `layer.0/MatMul`, `layer.1/MatMul` | 50.00% |" in (place.folder / "tables.md").read_text()


def test_each_way_of_keeping_int8_close_is_a_row(place):
    data.write_ablation(place.folder, place.model)
    data.write_entities(place.folder, place.model)
    shown = written(place)
    assert "| b | 0.9900 / 5.0% |" in block(shown, "int8") and "ablation.png" in block(shown, "int8")
    assert "| F1 against FP32's entities, " in block(shown, "deploy") and "0.6667" in block(shown, "deploy")
    text = (place.folder / "tables.md").read_text()
    assert "| b | 100.0% | 5.0% | 0.99000 |" in text and "128 texts of texts.txt" in text
    assert "Attention's own products have 12.5% of all MatMul FLOPs" in text
    assert "| TRT_INT8 | 9 | 0.5000 | 1.0000 | 0.6667 |" in text
    assert (place.folder / "ablation.png").is_file()


def test_the_table_of_plans_says_how_each_was_built(place):
    plan = {
        "built_as": "typed", "plain_int8": False, "graph": "model_TRT_FP16/1/model.onnx", "tf32": "off",
        "counts": {"layers": {"FP16": 9}, "weight_matmuls": {"FP16": 4}}, "plan_bytes": 2e6, "build_s": 3.0,
        "tensorrt_version": "10.16.1", "gpu": "Tesla T4", "compute_capability": "7.5", "driver": "1",
    }  # fmt: skip
    assert "Plans: not built." in block(written(place), "plans")
    data.write(place.folder, "plans", data.record(place.model, plans={"FP16": plan, "INT8": None}))
    assert "FP16 | model_TRT_FP16/1/model.onnx | typed | 9 FP16 | 4 FP16 |" in block(written(place), "plans")


# --- verdicts ------------------------------------------------------------------------


def test_verdicts_are_shown_with_their_conclusion_and_not_among_the_embedders(place):
    assert "Verdicts of a classifier: not measured." in written(place)
    folder = place.results / "reviews" / "a-cpu"
    data.write_verdicts(folder, data.classifier())
    text = written(place)
    shown, tables = block(text, "deploy"), (folder / "tables.md").read_text()
    assert "| reviews | agreement with torch, 2 texts | 0.9800 [0.9700, 0.9800] |" in shown
    assert "**reviews**. The rule names ONNX. " in shown and "verdicts.png" in shown
    assert "**Conclusion: ONNX.**" in tables and "answers by the same rule" in tables
    assert "These pass: ONNX. These do not: TRT_INT8." in tables
    assert "reviews" not in block(text, "results")
    assert report(place, "--check").returncode == 0


def test_what_a_cpu_has_no_kernels_for_is_called_emulated(place):
    folder = place.results / "reviews" / "a-cpu"
    data.write_verdicts(folder, data.classifier())
    record = json.loads((folder / "verdicts.json").read_text())
    for key, engine in (("TRT_BF16", "ONNX Runtime, CPU, in process"), ("TRT_FP8", "ONNX Runtime, CPU, emulated")):
        record["models"][key] = record["models"]["TRT_INT8"] | {"engine": engine}
        record["conclusion"]["candidates"].append({"model": key, "agreement_low": 0.9, "engine": engine})
    texts = (folder / "verdicts.csv").read_text().splitlines()
    header, *rows = (line.split(",") for line in texts)
    header += [f"{key} {label}" for key in ("TRT_BF16", "TRT_FP8") for label in ("negative", "positive")]
    lines = [header, *(row + row[-2:] * 2 for row in rows)]
    (folder / "verdicts.csv").write_text("\n".join(",".join(line) for line in lines) + "\n")
    data.write(folder, "verdicts", record)
    text = written(place)
    assert "| TRT_INT8 | TRT_BF16 (emulated) | TRT_FP8 (emulated) |" in block(text, "deploy")
    assert "not shown for TRT_INT8, TRT_BF16 (emulated) and TRT_FP8 (emulated)." in block(text, "findings")
    record["models"]["TRT_BF16"]["engine"] = record["conclusion"]["candidates"][2]["engine"] = "TensorRT, GPU"
    data.write(folder, "verdicts", record)
    assert "not shown for TRT_INT8, TRT_BF16 and TRT_FP8 (emulated)." in block(written(place), "findings")


def test_a_service_with_another_rule_than_the_study_is_said(place):
    calibration = {"file": "train.tsv", "count": 96}
    folder = place.results / "reviews" / "a-cpu"
    data.write_verdicts(folder, data.classifier(), served_verdict="largest logit", calibration=calibration)
    assert "INT8 was calibrated with 96 texts of train.tsv" in block(written(place), "deploy")
    assert "answers by another rule, the largest logit" in (folder / "tables.md").read_text()


def test_training_and_verdicts_are_tied_by_their_weights_and_not_by_a_name(place):
    folder = place.results / "reviews" / "a-cpu"
    data.write_verdicts(folder, data.classifier(weights_sha256="d" * 64))
    training = {"data": "data.tsv", "texts": 90, "accuracy": 0.875, "eval_texts": 40, "seconds": 61.2}
    training |= {"encoder": {"source": "hub: some/encoder"}, "weights_sha256": "e" * 64}
    data.write(folder, "training", training)
    written(place)
    assert "trained on" not in (folder / "tables.md").read_text()
    data.write(place.results / "reviews-checkpoint" / "other", "training", training | {"weights_sha256": "d" * 64})
    assert report(place, "--check").returncode == 1
    written(place)
    shown = (folder / "tables.md").read_text()
    assert "trained on data.tsv (90 texts) in 61 s, to a dev accuracy of 0.8750 on 40 texts" in shown


def test_a_changed_study_makes_text_and_picture_stale(place):
    folder = place.results / "reviews" / "a-cpu"
    data.write_verdicts(folder, data.classifier())
    written(place)
    record = json.loads((folder / "verdicts.json").read_text())
    record["conclusion"]["text"] = "another"
    data.write(folder, "verdicts", record)
    done = report(place, "--check")
    assert done.returncode == 1 and "verdicts.png" in done.stderr and "report.md" in done.stderr
