"""Sections on speed: the noise, throughput and latency of every model alone, and each level in full."""

from core.tables import EMBEDDERS, REFERENCE
from reporting.markdown import NOT_MEASURED, caption, listing, number, on_gpu, table

REPLICATE = "TRT_FP32"  # on a CPU it is the same file as ONNX, measured once more
FIGURES = {"throughput": "throughput_infer_per_s", "p50": "latency_p50_ms", "p99": "latency_p99_ms"}


def levels(perf):
    """{(model, concurrency): row} of what was measured."""
    return {(r["model"], r["concurrency"]): r for r in (perf or {}).get("rows", []) if "error" not in r}


def noise(perf):
    """{figure: (lowest, highest) ratio of the replicate to ONNX over the levels}; {} where it is a plan of its own."""
    engines, found, shown = perf["server"]["engines"], levels(perf), {}
    if engines.get(REPLICATE) != engines[REFERENCE]:
        return {}
    for name, key in FIGURES.items():
        pairs = [(found[m, c][key], found.get((REFERENCE, c), {}).get(key)) for m, c in found if m == REPLICATE]
        ratios = [a / b for a, b in pairs if a and b]
        if ratios:
            shown[name] = (min(ratios), max(ratios))
    return shown


def noise_factor(perf):
    """How many times as fast as another a model must be to count as faster."""
    if shown := noise(perf).get("throughput"):
        return max(shown[1], 1 / shown[0])
    return 1 + max((row["spread_percent"] for row in levels(perf).values()), default=0) / 100


def noise_line(perf):
    """The noise, and what follows from it for the tables."""
    if shown := noise(perf):
        ratios = listing(f"{low:.2f} to {high:.2f} for {name}" for name, (low, high) in shown.items())
        lead = (
            f"**Noise.** {REPLICATE} is the same file as {REFERENCE} here, measured a second time under another name. "
            f"The ratio of the two, over all levels, is {ratios}."
        )
    else:
        lead = "**Noise.** No model was measured twice; the largest spread between rounds of one level stands in."
    return f"{lead} A difference within a factor of {noise_factor(perf):.2f} therefore counts as none."


def best_key(perf, concurrency):
    """The embedder whose throughput is above every other's by more than the noise, or None."""
    found = levels(perf)
    speeds = {m: found[m, concurrency]["throughput_infer_per_s"] for m in EMBEDDERS if (m, concurrency) in found}
    *_, second, best = [0, 0, *sorted(speeds, key=speeds.get)]
    return best if second and speeds[best] > noise_factor(perf) * speeds[second] else None


def state(perf, key):
    """What a level without figures says."""
    row = next((r for r in perf["rows"] if (r["model"], r["concurrency"]) == key), None)
    return "refused" if row else NOT_MEASURED if list(key) in perf["planned"] else ""


def tail(row):
    """p99 of a row, which needs enough requests."""
    return "n too small" if row["latency_p99_ms"] is None else f"{row['latency_p99_ms']:.1f}"


def throughput_cell(perf, key):
    row = levels(perf).get(key)
    if not row:
        return state(perf, key)
    speed = f"{row['throughput_infer_per_s']:.1f}"
    speed = f"**{speed}**" if key[0] == best_key(perf, key[1]) else speed
    ends = f"({row['throughput_min_infer_per_s']:.1f} to {row['throughput_max_infer_per_s']:.1f})"
    return f"{speed} {ends}{'' if row['stable'] else ', unstable'}"


def latency_cell(perf, key):
    row = levels(perf).get(key)
    return f"{row['latency_p50_ms']:.1f} / {tail(row)}; {row['n']}" if row else state(perf, key)


def matrices(perf):
    """Throughput and latency, a row per model and a column per concurrency."""
    names = list(dict.fromkeys(m for m, _ in perf["planned"]))
    concurrencies = sorted({c for _, c in perf["planned"]})
    parts = []
    for lead, cell in (
        ("Throughput in texts per second by concurrency, with the slowest and the fastest round:", throughput_cell),
        ("Latency in ms by concurrency, p50 / p99; n requests:", latency_cell),
    ):
        rows = [[name, *(cell(perf, (name, c)) for c in concurrencies)] for name in names]
        parts.append(f"{lead}\n\n{table(['model', *map(str, concurrencies)], rows)}")
    return parts


def how_measured(perf):
    """Machine, tool and settings of a run in a sentence or two; what its speeds are worth."""
    s, engines = perf["settings"], listing(dict.fromkeys(perf["server"]["engines"].values()))
    lead = (
        f"{caption(perf)}. The load came from perf_analyzer over {s['protocol']}, {s['batch_size']} text a request "
        f"({s['inputs']}), in {s['rounds']} rounds of about {s['window_s']:g} s a level"
        f"{', in a quick run' if perf['quick'] else ''}. The embedders were executed by {engines}."
    )
    if not on_gpu(perf):
        lead += " **These speeds allow no conclusion about TensorRT**, whose speed on a GPU was not measured here."
    return lead


def level_table(perf):
    """Every level: client's latencies, server's split, what the server used."""
    found = {(r["model"], r["concurrency"]): r for r in perf["rows"]}
    rows = [{"model": m, "concurrency": c} | found.get((m, c), {"error": NOT_MEASURED}) for m, c in perf["planned"]]

    def cell(key, form=".1f"):
        return lambda r: "" if r.get(key) is None else format(r[key], form)

    spec = {
        "model": lambda r: r["model"],
        "concurrency": lambda r: r["concurrency"],
        "infer/s": lambda r: r.get("error") or f"{r['throughput_infer_per_s']:.1f}",
        "n": cell("n", ""),
        "served / bare": cell("served_to_bare", ".2f"),
        **{f"{k} ms": cell(f"latency_{k}_ms") for k in ("mean", "p50", "p90", "p95")},
        "p99 ms": lambda r: "" if "error" in r else tail(r),
        "queue ms": cell("server_queue_ms"),
        "compute ms": cell("server_compute_ms"),
        "mean batch": cell("mean_batch_size", ".2f"),
        "server CPU cores": cell("server_cpu_cores", ".2f"),
        "stable": lambda r: "" if "error" in r else "yes" if r["stable"] else f"no, {r['spread_percent']:.0f}%",
    }
    return table(spec, [[c(row) for c in spec.values()] for row in rows])


def bare_table(perf):
    """The graphs without a server, and the ensemble beside the sum of its parts."""
    bare = perf["bare_infer_per_s"]
    if not bare:
        return f"The graphs without a server: {NOT_MEASURED}."
    batches = list(next(iter(bare.values())))
    rows = [[key, *(number(speeds.get(b), ".1f") for b in batches)] for key, speeds in bare.items()]
    lead = "The same graphs without a server, in texts per second:"
    text = f"{lead}\n\n{table(['graph', *(f'batch {b}' for b in batches)], rows)}"
    row = levels(perf).get(("ensemble", 1))
    if row and len(bare) == len(EMBEDDERS) and all(speeds.get("1") for speeds in bare.values()):
        ratio = row["latency_mean_ms"] / sum(1e3 / speeds["1"] for speeds in bare.values())
        text += (
            "\n\nThe ensemble's mean latency at concurrency 1 is "
            f"{ratio:.2f} times the sum of the five runs without a server at batch 1."
        )
    return text


def performance(model):
    """The section of one model in the report."""
    perf = model["perf"]
    return [how_measured(perf), *matrices(perf)] if perf else [f"Speed: {NOT_MEASURED}."]
