"""Sections on speed: the noise, throughput and latency of every model alone, and each level in full."""

from core.tables import EMBEDDERS, REFERENCE
from reporting.markdown import DETAILS, NOT_MEASURED, caption, listing, number, on_gpu, relative, table

REPLICATE = "TRT_FP32"  # on a CPU it is the same file as ONNX, measured once more
FIGURES = {"throughput": "throughput_infer_per_s", "p50": "latency_p50_ms", "p99": "latency_p99_ms"}


def levels(perf):
    """{(model, concurrency): row} of what was measured."""
    return {(r["model"], r["concurrency"]): r for r in (perf or {}).get("rows", []) if "error" not in r}


def noise(perf):
    """{figure: (lowest, highest) ratio of the replicate to ONNX over the levels}; {} where it is a plan of its own."""
    engines, found, shown = perf["server"]["engines"], levels(perf), {}
    if REPLICATE not in engines or engines[REPLICATE] != engines[REFERENCE]:
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


def noise_line(perf, figures=("throughput",)):
    """The noise of some figures, and what follows from it for the tables."""
    if shown := {name: ends for name, ends in noise(perf).items() if name in figures}:
        ratios = listing(f"{low:.2f} to {high:.2f} for {name}" for name, (low, high) in shown.items())
        lead = f"**Noise.** {REPLICATE} is {REFERENCE}'s file under another name: the ratio of the two is {ratios}."
    else:
        lead = "**Noise.** No model was measured twice; the largest spread between rounds of one level stands in."
    return f"{lead} A difference within a factor of {noise_factor(perf):.2f} counts as none."


def best_key(perf, concurrency):
    """The embedder whose throughput is above every other's by more than the noise, or None."""
    found = levels(perf)
    speeds = {m: found[m, concurrency]["throughput_infer_per_s"] for m in EMBEDDERS if (m, concurrency) in found}
    *_, second, best = [0, 0, *sorted(speeds, key=speeds.get)]
    return best if second and speeds[best] > noise_factor(perf) * speeds[second] else None


def short(value):
    """82.4, 2180"""
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def tail(row):
    """p99 of a row, which needs enough requests."""
    return "–" if row["latency_p99_ms"] is None else short(row["latency_p99_ms"])


def throughput(perf, row):
    """Median of the rounds and their span; bold where an embedder is faster than every other one."""
    speed = short(row["throughput_infer_per_s"])
    speed = f"**{speed}**" if row["model"] == best_key(perf, row["concurrency"]) else speed
    ends = f"({short(row['throughput_min_infer_per_s'])} to {short(row['throughput_max_infer_per_s'])})"
    return f"{speed} {ends}{'' if row['stable'] else ', unstable'}"


def matrix(perf, cell):
    """A row per model and a column per concurrency; blank where no level was planned."""
    planned = [tuple(level) for level in perf["planned"]]
    rows = dict.fromkeys(planned, NOT_MEASURED)
    rows |= {(r["model"], r["concurrency"]): "refused" if "error" in r else cell(r) for r in perf["rows"]}
    names, concurrencies = dict.fromkeys(m for m, _ in planned), sorted({c for _, c in planned})
    return table({"model": m} | {str(c): rows.get((m, c), "") for c in concurrencies} for m in names)


def executed_by(perf):
    """What executed the graphs of a run, in words."""
    server = perf["server"]
    return listing(dict.fromkeys(server["engines"].values()) or [server.get("executed_by", NOT_MEASURED)])


def how_measured(perf):
    """Machine, tool and settings of a run in a sentence or two; what its speeds are worth."""
    s = perf["settings"]
    lead = (
        f"{caption(perf)}. The load came from perf_analyzer over {s['protocol']}, {s['batch_size']} text a request "
        f"({s['inputs']}), in {s['rounds']} rounds of about {s['window_s']:g} s a level"
        f"{', in a quick run' if perf['quick'] else ''}. What executed the graphs is {executed_by(perf)}."
    )
    if not on_gpu(perf):
        lead += " **These speeds allow no conclusion about TensorRT**, whose speed on a GPU was not measured here."
    return lead


def performance(model):
    """The section of one model in the report."""
    perf = model["perf"]
    return [
        how_measured(perf),
        "Throughput in texts per second by concurrency, with the slowest and the fastest round:",
        matrix(perf, lambda r: throughput(perf, r)),
        "Latency in ms by concurrency, p50 / p99; n requests:",
        matrix(perf, lambda r: f"{short(r['latency_p50_ms'])} / {tail(r)}; {r['n']}"),
    ]


def best_line(perf):
    """Why BEST is slow on a CPU, where it is; tests/test_makers.py counts the kernels."""
    found = levels(perf)
    ratios = [
        found["TRT_BEST", c][FIGURES["throughput"]] / found[REFERENCE, c][FIGURES["throughput"]]
        for m, c in found
        if m == "TRT_BEST" and (REFERENCE, c) in found
    ]
    if on_gpu(perf) or not ratios or max(ratios) * noise_factor(perf) >= 1:
        return []
    return [
        f"TRT_BEST reaches {min(ratios):.2f} to {max(ratios):.2f} of {REFERENCE}'s throughput here: ONNX Runtime's CPU has no kernel "
        "that multiplies 8-bit operands between Q/DQ pairs in FP16, so every run dequantizes all weights anew and multiplies "
        "in floating point between casts. It is made for TensorRT; on a CPU nobody should serve it."
    ]


# --- what padding costs --------------------------------------------------------------


def padding_ratios(model):
    """{(model, concurrency): throughput at dynamic length as a multiple of that at fixed length}."""
    own, fixed = levels(model["perf"]), levels(model["padded"] and model["padded"]["perf"])
    return {at: own[at][FIGURES["throughput"]] / fixed[at][FIGURES["throughput"]] for at in own if at in fixed}


def padding_table(model):
    """What padding costs, a row per model that was measured at both lengths; [] without any."""
    if not (ratios := padding_ratios(model)):
        return []
    length = model["padded"]["card"]["max_length"]
    lead = f"Throughput as a multiple of that of {model['padded']['title']}, where every text is padded to {length} tokens."
    names, concurrencies = dict.fromkeys(m for m, _ in ratios), sorted({c for _, c in ratios})
    rows = (
        {"model": m} | {f"concurrency {c}": number(ratios.get((m, c)), ".2f") for c in concurrencies} for m in names
    )
    return [f"{lead} {caption(model['padded']['perf'])}.", table(rows)]


def padding_line(model):
    """The same in a sentence: the embedders' ratios over all levels."""
    ratios = [ratio for (name, _), ratio in padding_ratios(model).items() if name in EMBEDDERS]
    if not ratios:
        return f"At dynamic length: {NOT_MEASURED}."
    return (
        f"Without padding (at dynamic length), the throughput of its embedders is {min(ratios):.2f} to {max(ratios):.2f} times as "
        f"high ([table]({relative(model, DETAILS)}))."
    )


def level_cells(model, concurrency, row):
    """One level: the client's latencies, the server's split, what the server used."""
    cells = {"model": model, "concurrency": concurrency, "texts/s": row.get("error")}
    if "error" in row:
        return cells
    return cells | {
        "texts/s": f"{row['throughput_infer_per_s']:.1f}",
        "n": row["n"],
        "served / bare": number(row.get("served_to_bare"), ".2f"),
        **{f"{k} ms": f"{row[f'latency_{k}_ms']:.1f}" for k in ("mean", "p50", "p90", "p95")},
        "p99 ms": tail(row),
        "queue ms": number(row["server_queue_ms"], ".1f"),
        "compute ms": number(row["server_compute_ms"], ".1f"),
        "mean batch": number(row["mean_batch_size"], ".2f"),
        "server CPU cores": number(row["server_cpu_cores"], ".2f"),
        "stable": "yes" if row["stable"] else f"no, {row['spread_percent']:.0f}%",
    }


def rate_cells(row):
    """One rate at which requests came at random, whether or not those before were answered."""
    cells = {"model": row["model"], "asked for, requests/s": f"{row['asked_requests_per_s']:.1f}"}
    cells |= {"of the best throughput": f"{row['share']:.0%}", "answered, requests/s": row.get("error")}
    if "error" in row:
        return cells
    return cells | {
        "answered, requests/s": f"{row['throughput_infer_per_s'] / row['batch_size']:.1f}",
        "n": row["n"],
        "lost": row["lost"],
        **{f"{k} ms": f"{row[f'latency_{k}_ms']:.1f}" for k in ("p50", "p95")},
        "p99 ms": tail(row),
        "queue ms": number(row["server_queue_ms"], ".1f"),
        "mean batch": number(row.get("mean_batch_size"), ".2f"),
        "stable": "yes" if row["stable"] else f"no, {row['spread_percent']:.0f}%",
    }


def rates(perf):
    """The table of rates, from which capacity.py answers; [] without any."""
    if not perf.get("rates"):
        return []
    lead = (
        "Requests that come at random moments (a Poisson process), at shares of the best throughput above; "
        "`capacity.py` answers from them. A latency counts from the moment of sending."
    )
    return [lead, table(map(rate_cells, perf["rates"]))]


def details(model):
    """Every level of one model, for its tables."""
    perf = model["perf"]
    found = {(r["model"], r["concurrency"]): r for r in perf["rows"]}
    rows = (level_cells(m, c, found.get((m, c), {"error": NOT_MEASURED})) for m, c in perf["planned"])
    share = "*Served / bare* is the throughput beside the best of the same graph without a server."
    parts = [how_measured(perf), noise_line(perf, FIGURES), share, table(rows)]
    return [*parts, *rates(perf), *best_line(perf), *padding_table(model)]
