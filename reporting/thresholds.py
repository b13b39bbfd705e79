"""Sections beyond the ridge: fused layers, the batch that fills a GPU, length and batch, and what was measured on a GPU."""

from core.tables import PRECISIONS
from reporting.markdown import NOT_MEASURED, caption, listing, percent, table


def predicted(record):
    """Thresholds of fused layers, those of every GPU, and the picture over length and batch; [] of an older record."""
    if "groups" not in record:
        return []
    tile, practical = record["tile"], record["practical_batch"]
    return [
        f"**Fused, and filled.** Attention is one kernel that never writes its scores, and a GELU is part of FFN 1's GEMM. For "
        f"each precision of {record['gpu']['name']}: from which batch on arithmetic is the bound, in brackets the same in "
        f"tokens, which holds at every length, or the length from which attention is bound by arithmetic; behind the slash "
        f"the batch from which on {record['length']}-token texts reach 80% of the peak. The first is necessary, not "
        f"sufficient: an SM computes {tile} × {tile} outputs at a time, a half empty tile or wave takes as long as a full one. "
        f'"–": not up to batch {practical}.',
        groups_table(record),
        f"The batch from which on all Linears together reach 80% of a GPU's peak, at {record['length']} tokens:",
        gpus_table(record),
        "Share of the peak that the whole model can reach, over length and batch:",
        "![Share of the peak over length and batch](surface.png)",
    ]


def group_cell(found):
    """from 5 (600 tokens) / 9"""
    said = found["verdict"]
    if found["verdict"] == "from":
        said = f"{found['batch']} ({found['tokens']} tokens)"
    elif found["length"]:
        said += f" (from length {found['length']})"
    unit = "" if found["unit"] == "tensor cores" or found["verdict"] == "never" else f", {found['unit']}"
    return f"{said}{unit} / {found['roof_batch'] or '–'}"


def groups_table(record):
    """A row for each fused group, a column for each precision."""
    names = list(dict.fromkeys(p for row in record["groups"] for p in row["precisions"]))
    return table(
        {"layers": row["group"]}
        | {p: group_cell(row["precisions"][p]) if p in row["precisions"] else "no such precision" for p in names}
        for row in record["groups"]
    )


def gpus_table(record):
    """A row for each GPU of the table."""
    names = [p for p in PRECISIONS if any(p in row for row in record["roof_batches"].values())]
    return table(
        {"GPU": gpu} | {p: (row[p] or "–") if p in row else "" for p in names}
        for gpu, row in record["roof_batches"].items()
    )


# --- measured ------------------------------------------------------------------------


def measured(model):
    """What torch measured on a device precision by precision, beside what was predicted from the roofs found there."""
    found = model["complexity"]["measured"]
    parts = [] if found and found["device"] == "cuda" else [f"A GPU: {NOT_MEASURED}."]
    if not found or "roofs" not in found:
        return parts
    roofs, rows = found["roofs"], found["thresholds"]
    peaks = listing(f"{peak / 1e12:.3g} in {p}" for p, peak in roofs["peak_flops"].items())
    lost = [f"{r['kind']} in {r['precision']}" for r in rows if not r["agree"]]
    return [
        *parts,
        f"**Measured** on {found['device'].upper()}, {found['library']}; {caption(found)}. A square GEMM reaches in TFLOP/s {peaks}; "
        f"a copy moves {roofs['bandwidth'] / 1e9:.0f} GB/s. The batches are those from which on a layer reaches 80% of that "
        f"GEMM, found among {listing(found['batches'])}. Prediction and measurement agree within a factor of two in "
        f"{len(rows) - len(lost)} of {len(rows)} cases{f'; not for {listing(lost)}' if lost else ''}.",
        table(map(measured_cells, rows)),
        f"Deviations of that arithmetic from FP32 without TF32, {found['texts']} texts:",
        table(
            {"precision": p, "relative L2": row.get("error") or percent(row["relative_l2_error"])}
            | {"mean cosine": "" if "error" in row else f"{row['mean_cosine']:.6f}"}
            for p, row in found["deviations"].items()
        ),
    ]


def measured_cells(row):
    ridge = row["ridge"]
    return {
        "layer": row["kind"],
        "precision": row["precision"],
        "ridge, predicted": ridge["batch"] if ridge["verdict"] == "from" else ridge["verdict"],
        "80%, predicted": row["predicted_batch"] or "–",
        "80%, measured": row["measured_batch"] or "–",
        "best share": f"{max(row['shares']):.0%}",
        "agree": "yes" if row["agree"] else "no",
    }


# --- every precision, executed on this CPU --------------------------------------------


def precisions(model):
    """Deviations of each typed graph and of TF32 on texts that chose nothing."""
    record = model["precisions"]
    lead = (
        f"{caption(record)}; {record['texts']['count']} texts of {record['texts']['file']} that neither calibrated nor "
        "selected, in this process. Emulated: operands are rounded exactly as the format says, sums are FP32."
    )
    rows = table(
        {
            "precision": name,
            "FLOPs in 8 bits": f"{row['eight_bit_share']:.0%}",
            "executed": "emulated" if row["emulated"] else "ONNX Runtime, CPU",
            "relative L2": percent(row["relative_l2_error"]),
            "mean cosine": "not finite" if row["mean_cosine"] is None else f"{row['mean_cosine']:.6f}",
            "gate": f"{percent(row['gate']['relative_l2_error'])} / {row['gate']['mean_cosine']:g}",
            "verdict": "within" if row["within_gate"] else "beyond",
        }
        for name, row in record["precisions"].items()
    )
    return [lead, rows]
