"""Sections on what a precision does to the answers: deviations, sentence similarity, the search for INT8."""

from reporting.markdown import NOT_MEASURED, caption, columns, listing, number, percent, table

EMULATED = "FP32 as TF32 (emulated)"
DEVIATIONS = {  # heading -> key of an average, how it is written
    "relative L2": ("relative_l2_error", percent),
    "of the worst text": ("worst_relative_l2_error", percent),
    "mean cosine": ("mean_cosine", "{:.6f}".format),
    "max abs": ("max_abs_error", "{:.2e}".format),
    "mean abs": ("mean_abs_error", "{:.2e}".format),
    "argmax flips": ("argmax_flip_share", percent),
}


def averages(model):
    """{plan or EMULATED: averages over texts, or an error}; {} where not measured."""
    quality = model["quality"] or {}
    emulated = quality.get("emulated", {}).get("TF32")
    return quality.get("averages", {}) | ({EMULATED: emulated} if emulated else {})


def deviation(model, plan):
    """A plan's relative L2 error as a share, or None."""
    return averages(model).get(plan, {}).get("relative_l2_error")


def deviations(model):
    """What the plans' outputs differ by, averages over texts."""
    quality = model["quality"]
    if not quality:
        return [f"Deviations: {NOT_MEASURED}."]
    rows = []
    for plan, row in averages(model).items():
        engine = quality["server"]["engines"].get(plan, "ONNX Runtime, CPU")  # TF32 is emulated in process
        cells = [form(row[key]) if "error" not in row else "" for key, form in DEVIATIONS.values()]
        rows.append([plan, row.get("error", engine), *cells])
    texts = quality["texts"]
    lead = f"{caption(quality)}; {texts['count']} texts ({texts['file']})."
    return [lead, table(["plan", "executed by", *DEVIATIONS], rows)]


def similarity(models):
    """The last hidden state and the similarity of sentences, per graph."""
    rows = [(m, plan, row) for m in models if m["sts"] for plan, row in m["sts"]["plans"].items()]
    spec = {
        "graph": lambda r: f"{r[0]['title']}: {r[1]}",
        "hidden state: mean cosine": lambda r: f"{r[2]['mean_cosine']:.6f}",
        "hidden state: relative L2": lambda r: percent(r[2]["relative_l2_error"]),
        "Spearman of sentence pairs": lambda r: number(r[2]["spearman"], ".4f"),
        "pairs": lambda r: r[0]["sts"]["pairs"]["count"] if r[0]["sts"]["pairs"] else "none",
    }
    return columns(rows, spec) if rows else f"Last hidden state: {NOT_MEASURED}."


# --- the search for INT8 -------------------------------------------------------------


def fidelity(row):
    """Both figures that the search's target is made of."""
    return f"{number(row['mean_cosine'], '.4f')} / {percent(row['relative_l2_error'])}"


def searches(models):
    """What the search chose for every model, a row each."""

    def reached(precision):
        return lambda r: fidelity(r[1]["reached"][precision]) if r[1]["reached"] else "target not met"

    spec = {
        "model": lambda r: r[0]["title"],
        "texts that calibrate + select": lambda r: f"{r[1]['texts']['calibration']} + {r[1]['texts']['selection']}",
        "FLOPs of weight MatMuls in INT8": lambda r: f"{r[1]['int8_flops_share'] or 0:.1%}",
        "target": lambda r: f"{r[1]['target']['mean_cosine']:g} / {percent(r[1]['target']['relative_l2_error'])}",
        "INT8 reached": reached("INT8"),
        "BEST reached": reached("BEST"),
    }
    rows = [(m, m["sensitivity"]) for m in models if m["sensitivity"]]
    return columns(rows, spec) if rows else f"Search for INT8: {NOT_MEASURED}."


def search(model):
    """The search of one model in full: its curve, and its MatMuls, the largest error first."""
    record = model["sensitivity"]
    lead = (
        f"{caption(record)}; {record['texts']['file']}, seed {record['seed']}; {record['seconds']:.0f} s, "
        f"{record['peak_memory_mib']} MiB at most{'; stopped by --max-minutes' if record['time_was_over'] else ''}."
    )
    errors = {
        "relative L2": lambda r: percent(r["relative_l2_error"]),
        "mean cosine": lambda r: number(r["mean_cosine"], ".5f"),
    }
    curve = {"share of FLOPs in INT8": lambda r: f"{r['int8_flops_share']:.1%}"} | errors
    matmuls = {
        "MatMul, alone in INT8": lambda r: f"`{r['matmul']}`",
        "share of FLOPs": lambda r: f"{r['flops_share']:.2%}",
        **errors,
        "smoothing α": lambda r: "" if r["alpha"] is None else f"{r['alpha']:g}{' + offsets' if r['offsets'] else ''}",
        "computed in": lambda r: "INT8" if r["int8"] else "floating point",
        "why": lambda r: r["why"],
    }
    ranked = sorted(record["matmuls"], key=lambda r: -(r["relative_l2_error"] or 0))
    return [lead, columns(record["curve"], curve), columns(ranked, matmuls)]


# --- plans ---------------------------------------------------------------------------


def plans(models):
    """The plans there are, and what the compile check says of the graphs."""

    def counts(what):
        return lambda r: ", ".join(f"{n} {p}" for p, n in r[1]["counts"][what].items())

    spec = {
        "plan": lambda r: r[0],
        "graph": lambda r: r[1]["graph"],
        "built as": lambda r: r[1]["built_as"] + (", plain INT8" if r[1]["plain_int8"] else ""),
        "layers": counts("layers"),
        "weight MatMuls": counts("weight_matmuls"),
        "MB": lambda r: f"{r[1]['plan_bytes'] / 1e6:.1f}",
        "TF32": lambda r: r[1]["tf32"],
        "built with": lambda r: f"TensorRT {r[1]['tensorrt_version']}, driver {r[1]['driver']}",
        "for": lambda r: f"{r[1]['gpu']} ({r[1]['compute_capability']})",
    }
    rows = [(f"{m['title']}: {p}", row) for m in models if m["plans"] for p, row in m["plans"]["plans"].items() if row]
    parts = [columns(rows, spec) if rows else "Plans: not built. A plan needs a GPU."]
    for model in (m for m in models if m["compile"]):
        record = model["compile"]
        by_state = {None: []} | {row["error"]: [] for row in record["rows"]}
        for row in record["rows"]:
            by_state[row["error"]].append(f"{row['graph']} for {row['architecture']}")
        architectures = listing(dict.fromkeys(row["architecture"] for row in record["rows"]))
        parts.append(
            f"**{model['title']}**: {len(by_state.pop(None))} of {len(record['rows'])} pairs of a graph and an architecture "
            f"compiled with TensorRT for RTX {record['tensorrt_rtx']} ({architectures}). {caption(record)}."
            + "".join(f" Refused: {listing(names)}: {error}." for error, names in by_state.items())
        )
    return parts
