"""Pictures of a model's layers: the roofline, and the search for INT8."""

import matplotlib.pyplot as plt

from core.tables import PRECISIONS


def along(values, batch):
    """A figure that is affine in the batch, from its values at batch 1 and 8."""
    return values["1"] + (values["8"] - values["1"]) * (batch - 1) / 7


def intensity(found, batch):
    """FLOP/byte at any batch: FLOPs and bytes are both affine in it."""
    flops = {b: found["intensity"][b] * found["bytes"][b] for b in ("1", "8")}
    return along(flops, batch) / along(found["bytes"], batch)


def peak_of(gpu, kind, precision):
    """FLOP/s that bound a layer: the tensor cores' of the precision for matmuls, the vector units' FP32 for the rest."""
    if not kind["matmul"]:
        return gpu["peak_flops"]["FP32"]
    row = PRECISIONS[precision]
    return gpu["peak_flops"].get(row.peak if kind["op"] == "linear" else row.other_peak)


def draw_roofline(model):
    """Left: intensity against batch with the ridges. Right: the roofs and every kind of layer at batch 1 and 8."""
    record = model["complexity"]
    gpu = record["gpu"]
    precision = next(p for p in ("FP16", "FP32", *gpu["peak_flops"]) if gpu["peak_flops"].get(p))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 5.6), layout="constrained")
    batches = [2**i for i in range(11)]
    groups = {}  # layers of the same intensity at every batch share a line
    for kind in (k for k in record["kinds"] if k["flops"]):
        values = tuple(intensity(kind["precisions"][precision], b) for b in batches)
        groups.setdefault((*(f"{v:.3g}" for v in values), kind["matmul"]), []).append((kind, values))
    for i, members in enumerate(groups.values()):
        kind, values = members[0]
        style = {"color": f"C{i % 10}", "marker": "os^Dv<>pP*X"[i % 11], "markersize": 6}
        left.plot(batches, values, linewidth=1, label=", ".join(k["kind"] for k, _ in members), **style)
        for batch, face in (("1", "none"), ("8", style["color"])):
            x = kind["precisions"][precision]["intensity"][batch]
            y = min(peak_of(gpu, kind, precision), x * gpu["bandwidth"]) / 1e12
            right.plot(x, y, linestyle="", markerfacecolor=face, **style)
    for kinds, peak, dashes in (
        ("matmuls", gpu["peak_flops"][precision], "-"),
        ("all others, vector units", gpu["peak_flops"]["FP32"], "--"),
    ):
        ridge = peak / gpu["bandwidth"]
        left.axhline(ridge, color="black", linestyle=dashes, linewidth=1, label=f"ridge of {kinds}")
        xs = [0.05, ridge, 3000]
        right.plot(
            xs,
            [min(peak, x * gpu["bandwidth"]) / 1e12 for x in xs],
            color="black",
            linestyle=dashes,
            linewidth=1,
            label=f"roof of {kinds}",
        )
    for face, batch in (("none", 1), ("0.4", 8)):
        right.plot(
            [], [], linestyle="", marker="o", color="0.4", markerfacecolor=face, label=f"a layer at batch {batch}"
        )
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter("{x:g}")
    left.set(xlabel="batch", ylabel=f"intensity in {precision}, FLOP/byte", yscale="log")
    figure.legend(*left.get_legend_handles_labels(), fontsize=7, ncols=4, loc="outside lower center")
    right.set(xlabel=f"intensity in {precision}, FLOP/byte", ylabel="attainable TFLOP/s", xscale="log", yscale="log")
    right.legend(fontsize=7)
    for axes in (left, right):
        axes.grid(which="both", alpha=0.2)
    figure.suptitle(f"{model['title']}: {precision}, computed for {gpu['name']} from its data sheet", fontsize=10)
    return figure


def draw_sensitivity(model):
    """Left: quality against the share in INT8. Right: relative L2 error of each MatMul alone in INT8."""
    record = model["sensitivity"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained", width_ratios=(1, 1.3))
    points = [p for p in record["curve"] if p["mean_cosine"] is not None]
    shares, target = [100 * p["int8_flops_share"] for p in points], record["target"]
    for name, style, values, limit in (
        ("1 - mean cosine", "o-", [1 - p["mean_cosine"] for p in points], 1 - target["mean_cosine"]),
        ("relative L2 error", "s--", [p["relative_l2_error"] for p in points], target["relative_l2_error"]),
    ):
        (line,) = left.plot(shares, values, style, label=name)
        left.axhline(limit, color=line.get_color(), linestyle=":", label=f"target: {name} at most {limit:.3g}")
    if record["int8_flops_share"]:
        left.axvline(100 * record["int8_flops_share"], color="gray", linewidth=0.8, label="chosen")
    output = next(iter(record["model"]["outputs"]))
    left.set(xlabel="share of the weight-MatMul FLOPs in INT8, %", ylabel=f"deviation of {output}", yscale="log")
    left.grid(which="both", alpha=0.25)
    left.legend(fontsize=7)
    rows = [row for row in record["matmuls"] if row["relative_l2_error"] is not None]
    names = [r["matmul"].removesuffix("/MatMul").removesuffix("/Gemm").removeprefix("transformer.") for r in rows]
    for int8, color, label in ((True, "tab:blue", "in INT8"), (False, "lightgray", "left in floating point")):
        shown = [row["relative_l2_error"] if row["int8"] == int8 else 0 for row in rows]
        right.barh(names, shown, color=color, label=label)
    right.invert_yaxis()
    right.tick_params(axis="y", labelsize=max(3, min(7, 220 / max(1, len(rows)))))
    right.set(xlabel="relative L2 error with this MatMul alone in INT8")
    right.grid(axis="x", alpha=0.25)
    right.legend(fontsize=7)
    figure.suptitle(f"{model['title']}: search for INT8", fontsize=10)
    return figure
