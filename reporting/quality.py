"""Sections on what a precision does to the answers: deviations, sentence similarity, the search for INT8."""

from core.tables import PRECISIONS
from reporting.markdown import NOT_MEASURED, caption, fold, listing, number, percent, relative, table

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
        rows.append([plan, engine if "error" not in row else row["error"], *cells])
    texts = quality["texts"]
    lead = f"{caption(quality)}; {texts['count']} texts ({texts['file']})."
    return [lead, table(["plan", "executed by", *DEVIATIONS], rows)]


def similarity(models):
    """Rank correlation of the sentences' similarities with people's scores, a row per model; [] where not measured."""
    found = [m for m in models if m["sts"] and m["sts"]["pairs"]]
    if not found:
        return []
    plans = list(dict.fromkeys(plan for m in found for plan in m["sts"]["plans"]))
    rows = []
    for m in found:
        cells = (number(m["sts"]["plans"].get(plan, {}).get("spearman"), ".4f") for plan in plans)
        rows.append([m["title"], f"{m['sts']['pairs']['count']} ({m['sts']['pairs']['file']})", *cells])
    return [
        "Spearman's rank correlation of the similarity of two sentences (the cosine of their mean hidden states) "
        "with the scores that people gave:",
        table(["model", "pairs of sentences", *plans], rows),
    ]


def hidden_state(model):
    """How far the encoder's last hidden state moves, per graph."""
    record = model["sts"]
    if not record:
        return [f"Last hidden state: {NOT_MEASURED}."]
    rows = [
        [plan, f"{row['mean_cosine']:.6f}", percent(row["relative_l2_error"]), number(row["spearman"], ".4f")]
        for plan, row in record["plans"].items()
    ]
    lead = f"{caption(record)}; {record['texts']} texts, executed without a server."
    return [lead, table(["graph", "mean cosine", "relative L2", "Spearman of sentence pairs"], rows)]


# --- the search for INT8 -------------------------------------------------------------


def fidelity(row):
    """Both figures that the search's target is made of."""
    return f"{number(row['mean_cosine'], '.4f')} / {percent(row['relative_l2_error'])}"


def searches(models):
    """What the search chose for every model, a row each."""
    rows = []
    for model in (m for m in models if m["sensitivity"]):
        record = model["sensitivity"]
        texts, target = record["texts"], record["target"]
        reached = [fidelity(record["reached"][p]) if record["reached"] else "target not met" for p in ("INT8", "BEST")]
        wanted = f"{target['mean_cosine']:g} / {percent(target['relative_l2_error'])}"
        share = f"{record['int8_flops_share'] or 0:.1%}"
        rows.append([model["title"], f"{texts['calibration']} + {texts['selection']}", share, wanted, *reached])
    header = ["model", "texts that calibrate + select", "FLOPs of weight MatMuls in INT8", "target"]
    return table([*header, "INT8 reached", "BEST reached"], rows) if rows else f"Search for INT8: {NOT_MEASURED}."


def hardest(record, count=3):
    """The MatMuls whose error alone in INT8 is largest, as a sentence."""
    rows = sorted((r for r in record["matmuls"] if r["relative_l2_error"]), key=lambda r: -r["relative_l2_error"])
    if not rows:
        return ""
    named = (f"`{r['matmul']}` ({percent(r['relative_l2_error'])})" for r in rows[:count])
    return f"The MatMuls with the largest relative L2 error, each alone in INT8, are {listing(named)}."


def search(model):
    """The search of one model in full."""
    record = model["sensitivity"]
    if not record:
        return [f"Search for INT8: {NOT_MEASURED}."]
    curve = [
        [f"{p['int8_flops_share']:.1%}", number(p["mean_cosine"], ".5f"), percent(p["relative_l2_error"])]
        for p in record["curve"]
    ]
    lead = (
        f"{caption(record)}; {record['texts']['file']}, seed {record['seed']}; {record['seconds']:.0f} s, "
        f"{record['peak_memory_mib']} MiB at most{'; stopped by --max-minutes' if record['time_was_over'] else ''}."
    )
    return [
        lead,
        table(["share of FLOPs in INT8", "mean cosine", "relative L2"], curve),
        matmul_table(record),
    ]


def matmul_table(record):
    """A row per MatMul, the largest error first; those that are alike together."""
    rows = []
    for row in sorted(record["matmuls"], key=lambda r: -(r["relative_l2_error"] or 0)):
        alpha = "" if row["alpha"] is None else f"{row['alpha']:g}{' + offsets' if row['offsets'] else ''}"
        error, cosine = percent(row["relative_l2_error"]), number(row["mean_cosine"], ".5f")
        where = "INT8" if row["int8"] else "floating point"
        rows.append([f"`{row['matmul']}`", f"{row['flops_share']:.2%}", error, cosine, alpha, where, row["why"]])
    header = ["MatMul, alone in INT8", "share of FLOPs", "relative L2", "mean cosine", "smoothing α", "computed in"]
    return table([*header, "why"], fold(rows))


# --- plans ---------------------------------------------------------------------------


def plan_rows(models):
    """A row per plan of every model: from which graph and how it was built, and what is in it."""
    rows = []
    for model in (m for m in models if m["plans"]):
        for precision in PRECISIONS:
            m = model["plans"].get("plans", {}).get(precision)
            if not m:
                continue
            counts = [", ".join(f"{n} {p}" for p, n in m["counts"][k].items()) for k in ("layers", "weight_matmuls")]
            how = m["built_as"] + (", plain INT8" if m["plain_int8"] else "")
            target = f"TensorRT {m['tensorrt_version']}, {m['gpu']} ({m['compute_capability']}), driver {m['driver']}"
            size = f"{m['plan_bytes'] / 1e6:.1f}"
            rows.append([f"{model['title']}: {precision}", m["graph"], how, *counts, size, m["tf32"], target])
    return rows


def plans(models):
    """The plans there are, and what the compile check says of the graphs."""
    header = ["plan", "graph", "built as", "layers", "weight MatMuls", "MB", "TF32", "built with, on"]
    rows = plan_rows(models)
    parts = [table(header, rows) if rows else "Plans: not built. A plan needs a GPU."]
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


def int8_picture(model):
    """The picture of a model's search with what it shows."""
    if not model["sensitivity"]:
        return []
    alt = "Quality against the share in INT8; error of each MatMul alone in INT8"
    return [f"![{alt}]({relative(model, 'sensitivity.png')})", hardest(model["sensitivity"])]
