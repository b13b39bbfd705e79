"""Sections on what a precision does to the answers: deviations, sentence similarity, the search for INT8."""

from reporting.markdown import NOT_MEASURED, caption, listing, number, percent, relative, share, table

EMULATED = "FP32 as TF32 (emulated)"


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
    quality, rows = model["quality"], []
    for plan, row in averages(model).items():
        cells = {"plan": plan, "relative L2": row.get("error") or percent(row["relative_l2_error"])}
        if "error" not in row:
            cells |= {
                "of the worst text": percent(row["worst_relative_l2_error"]),
                "mean cosine": f"{row['mean_cosine']:.6f}",
                "max abs": f"{row['max_abs_error']:.2e}",
                "mean abs": f"{row['mean_abs_error']:.2e}",
                "argmax flips": percent(row["argmax_flip_share"]),
            }
        rows.append(cells)
    texts, engines = quality["texts"], quality["server"]["engines"]
    engines = listing(dict.fromkeys(engines.get(row["plan"], "ONNX Runtime, CPU") for row in rows))  # TF32 in process
    return [f"{caption(quality)}; {texts['count']} texts ({texts['file']}), executed by {engines}.", table(rows)]


def similarity(models):
    """The last hidden state of each model, and Spearman's correlation of its similarities of sentences, per graph."""
    parts = []
    for m in (m for m in models if m["sts"]):
        record, pairs = m["sts"], m["sts"]["pairs"]
        rows = (
            {
                "graph": plan,
                "mean cosine": f"{row['mean_cosine']:.6f}",
                "relative L2": percent(row["relative_l2_error"]),
                **({f"Spearman of {pairs['count']} pairs": number(row["spearman"], ".4f")} if pairs else {}),
            }
            for plan, row in record["plans"].items()
        )
        similarities = ", and the similarity of sentences" if pairs else ""
        parts += [f"The last hidden state of {m['title']}{similarities}:", table(rows)]
    return parts or [f"The last hidden state: {NOT_MEASURED}."]


def fidelity(row):
    """Both figures that the search's target is made of."""
    return f"{number(row['mean_cosine'], '.4f')} / {percent(row['relative_l2_error'])}"


def kept(models):
    """What each way of keeping INT8 close brings every model, and the share of its FLOPs that is written in INT8."""
    shown = [m for m in models if m["ablation"]]
    if not shown:
        searched = [m for m in models if m["sensitivity"]][:1]
        pictures = [f"![Quality against the share in INT8]({relative(m, 'sensitivity.png')})" for m in searched]
        return [searches(models), *pictures]
    rows = {}
    for model in shown:
        for row in model["ablation"]["rows"]:
            rows.setdefault(row["ways"], {})[model["title"]] = fidelity(row)
        if model["sensitivity"]:
            written = share(model["sensitivity"]["int8_flops_share"] or 0)
            rows.setdefault("share of the FLOPs written in INT8", {})[model["title"]] = written
    cells = [
        {"all weight MatMuls in INT8": ways, **{m["title"]: row.get(m["title"], "") for m in shown}}
        for ways, row in rows.items()
    ]
    return [table(cells), f"![Error with each further way]({relative(shown[0], 'ablation.png')})"]


def searches(models):
    """What the search chose for every model, a row each."""
    rows = []
    for model in (m for m in models if m["sensitivity"]):
        record = model["sensitivity"]
        reached = record["reached"]
        rows.append(
            {
                "model": model["title"],
                "texts that calibrate + select": f"{record['texts']['calibration']} + {record['texts']['selection']}",
                "FLOPs of weight MatMuls in INT8": share(record["int8_flops_share"] or 0),
                "target": f"{record['target']['mean_cosine']:g} / {percent(record['target']['relative_l2_error'])}",
                **{f"{p} reached": fidelity(reached[p]) if reached else "target not met" for p in ("INT8", "BEST")},
            }
        )
    return table(rows)


def errors(row):
    return {"relative L2": percent(row["relative_l2_error"]), "mean cosine": number(row["mean_cosine"], ".5f")}


def search(model):
    """The search of one model in full: its curve, and its MatMuls, the largest error first."""
    record, products = model["sensitivity"], "; attention's products in INT8 in both graphs, but not in the curve"
    lead = (
        f"{caption(record)}; {record['texts']['file']}, seed {record['seed']}; {record['seconds']:.0f} s, "
        f"{record['peak_memory_mib']} MiB at most{'; stopped by --max-minutes' if record['time_was_over'] else ''}"
        f"{products if record.get('attention') else ''}."
    )
    curve = table({"share of FLOPs in INT8": f"{r['int8_flops_share']:.1%}"} | errors(r) for r in record["curve"])
    matmuls = table(
        {
            "MatMul, alone in INT8": f"`{r['matmul']}`",
            "share of FLOPs": f"{r['flops_share']:.2%}",
            **errors(r),
            "smoothing α": "" if r["alpha"] is None else f"{r['alpha']:g}{' + offsets' if r['offsets'] else ''}",
            "computed in": "INT8" if r["int8"] else "floating point",
            "why": r["why"],
        }
        for r in sorted(record["matmuls"], key=lambda r: -(r["relative_l2_error"] or 0))
    )
    return [lead, curve, matmuls]


def ablation(model):
    """What each way of keeping INT8 close brings, and what attention's products cost."""
    record = model["ablation"]
    products = record["rows"][-1].get("products_flops_share")
    lead = (
        f"All weight MatMuls in INT8, one way added after another; {record['measured']['texts']} texts of "
        f"{record['measured']['file']}, of which none calibrated. {caption(record)}."
    )
    if products is not None:
        lead += f" Attention's own products have {products:.1%} of all MatMul FLOPs of these texts."
    rows = table(
        {"ways": row["ways"], "share of FLOPs in INT8": f"{row['int8_flops_share']:.1%}", **errors(row)}
        for row in record["rows"]
    )
    return [lead, rows, "![Error with each further way](ablation.png)"]


def entities(model):
    """What each graph finds beside FP32."""
    record = model["entities"]
    lead = (
        f"Entities of {record['texts']['count']} texts of {record['texts']['file']}, against those of FP32: label and both "
        f"ends the same. {caption(record)}."
    )
    rows = table(
        {
            "graph": key,
            "entities": row["entities"],
            **{name: f"{row[name]:.4f}" for name in ("precision", "recall", "f1")},
        }
        for key, row in record["plans"].items()
    )
    return [lead, rows]


def plan_cells(model, name, row):
    """One plan: what it was built from and how, what it holds, and for which GPU."""
    counts = {what: ", ".join(f"{n} {p}" for p, n in found.items()) for what, found in row["counts"].items()}
    return {
        "plan": f"{model['title']}: {name}",
        "graph": row["graph"],
        "built as": row["built_as"] + (", plain INT8" if row["plain_int8"] else ""),
        "layers": counts["layers"],
        "weight MatMuls": counts["weight_matmuls"],
        "MB": f"{row['plan_bytes'] / 1e6:.1f}",
        "TF32": row["tf32"],
        "built with, for": f"TensorRT {row['tensorrt_version']}, {row['gpu']} ({row['compute_capability']}), driver {row['driver']}",
    }


def plans(models):
    """The plans there are, and what the compile check says of the graphs."""
    rows = [plan_cells(m, p, row) for m in models if m["plans"] for p, row in m["plans"]["plans"].items() if row]
    parts = [table(rows) if rows else "Plans: not built. A plan needs a GPU."]
    lines = {}
    for model in (m for m in models if m["compile"]):
        lines.setdefault(compile_line(model["compile"]), []).append(model)
    for line, of in lines.items():
        each = ", each" if len(of) > 1 else ""
        parts.append(f"**{listing(m['title'] for m in of)}**{each}: {line} {caption(*(m['compile'] for m in of))}.")
    return parts


def compile_line(record):
    """How many pairs of a graph and an architecture were compiled, and which were refused."""
    rows = record["rows"]
    refused = [f"{r['graph']} for {r['architecture']}: {r['error']}" for r in rows if r["error"]]
    return (
        f"{len(rows) - len(refused)} of {len(rows)} pairs of a graph and an architecture compiled with TensorRT for "
        f"RTX {record['tensorrt_rtx']} ({listing(dict.fromkeys(r['architecture'] for r in rows))})."
        f"{' Refused: ' + '; '.join(refused) + '.' if refused else ''}"
    )
