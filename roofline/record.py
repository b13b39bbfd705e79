"""The record of a model's complexity: its layers, three counts, and what bounds each kind of layer on a GPU."""

import csv

import torch

from core.files import read_json, replace_when_done, write_json
from core.record import environment_record, results_folder
from core.tables import PRECISIONS, SERVED
from roofline import model as roofline
from roofline.counts import compare_counts, compare_elementwise, count_closed_form, count_fvcore, count_torch
from roofline.gpus import precisions_of, read_hardware
from roofline.layers import UnknownLayer, by_kind, list_layers
from roofline.waves import TILE, describe_gpus, describe_groups, describe_surface

BATCHES = (1, 8)
CONVENTION = "1 multiply-add = 2 FLOPs"


def count_flops(embedder, length):
    """(layers, counts): every layer in closed form, and the three counts of matmul FLOPs at batch 1, which agree."""
    try:
        layers = list_layers(embedder, length)
        closed = count_closed_form(layers, length)
        fvcore, torch_flops = count_fvcore(embedder, length), count_torch(embedder, length)
        compare_elementwise(layers, fvcore["unsupported_ops"])
        compare_counts(closed, fvcore, torch_flops)
    except UnknownLayer as error:
        raise SystemExit(
            f"complexity: expected layers that the closed form knows, found {error}; "
            "no total was written, it would be too small; add the layer to roofline/layers.py"
        ) from None
    counts = {"closed_form_flops": sum(closed.values()), "torch_flops": torch_flops["flops"]}
    counts |= {f"fvcore_{key}": value for key, value in fvcore.items() if key != "by_module"}
    return layers, counts


def describe_kind(layer, length, gpu, total_flops):
    """One kind of layer: FLOPs, bytes, intensity, bound and threshold in every precision."""
    calls = layer["calls"]
    flops = calls * roofline.cost(layer, 1, length).flops
    row = layer | {"matmul": roofline.is_matmul(layer), "flops": flops, "share": flops / total_flops, "precisions": {}}
    for p in PRECISIONS:
        peak = roofline.peak_flops(gpu, layer, p)
        row["precisions"][p] = {
            "bytes": {b: calls * roofline.bytes_moved(layer, b, length, p) for b in BATCHES},
            "intensity": {b: roofline.intensity(layer, b, length, p) for b in BATCHES},
            "bound": {b: roofline.bound(layer, b, length, p, gpu) for b in BATCHES},
            "threshold": roofline.threshold(layer, length, p, peak, gpu["bandwidth"]) if peak else None,
        }
    return row


def least_latencies(kinds, *limits):
    """Seconds of a model layer by layer, and with the chains fused. limits: batch, length, precision, GPU."""
    groups = {"apart": roofline.alone(kinds), "fused": roofline.fuse(kinds, *limits[:2])}
    return {how: roofline.least_time(of, *limits) for how, of in groups.items()}


def count_complexity(embedder, card, gpu):
    """The whole record of a model on a GPU, but for what is measured. Exits for an unknown layer."""
    length = card["max_length"]
    layers, counts = count_flops(embedder, length)
    kinds = by_kind(layers)
    total = sum(layer["calls"] * roofline.cost(layer, 1, length).flops for layer in layers)
    parameters = sum(p.numel() for p in embedder.parameters())
    linear = sum(m.weight.numel() for m in embedder.modules() if isinstance(m, torch.nn.Linear))
    ridges = {p: peak / gpu["bandwidth"] if peak else None for p, peak in gpu["peak_flops"].items()}
    return {
        "model": card,
        "environment": environment_record(),
        "convention": CONVENTION,
        "length": length,
        "counts": counts,
        "totals": {
            "flops": total,
            "matmul_flops": counts["closed_form_flops"],
            "flops_per_token": total / length,
            "parameters": parameters,
            "weight_bytes": {
                name: linear * row.element.weight + (parameters - linear) * row.element.other
                for name, row in PRECISIONS.items()
            },
        },
        "gpu": gpu | {"ridge_points": ridges},
        "practical_batch": roofline.PRACTICAL_BATCH,
        "kinds": [describe_kind(layer, length, gpu, total) for layer in kinds],
        "least_latency_s": {p: {b: least_latencies(kinds, b, length, p, gpu) for b in BATCHES} for p in PRECISIONS},
        "tile": TILE,
        "groups": describe_groups(kinds, length, gpu, precisions_of(gpu)),
        "roof_batches": describe_gpus(kinds, length, read_hardware().values(), PRECISIONS),
        "measured": None,
        "layers": layers,
    }


def write_complexity(record, results):
    """complexity.json, surface.json, and complexity.csv with a row per layer.

    An earlier measurement of the same layers is kept.
    """
    folder = results_folder(results, record["model"])
    path = folder / "complexity.json"
    if record["measured"] is None and path.exists():
        earlier = read_json(path, "remove it")
        if (earlier.get("layers"), earlier.get("length")) == (record["layers"], record["length"]):
            record["measured"] = earlier["measured"]
    write_layers(record, folder / "complexity.csv")
    surface = {key: record[key] for key in ("model", "environment", "gpu")}
    surface |= describe_surface(by_kind(record["layers"]), record["gpu"], precisions_of(record["gpu"]))
    write_json(folder / "surface.json", surface)
    write_json(path, record)
    return path


def write_layers(record, path):
    """A row per layer: FLOPs, bytes and FLOP/byte at batch 1 of all its calls. TF32 is stored as FP32."""
    with replace_when_done(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["layer", "kind", "calls", "flops", *(f"{w}_{p}" for p in SERVED for w in ("bytes", "intensity"))]
        )
        for layer in record["layers"]:
            calls, length = layer["calls"], record["length"]
            row = [layer["name"], layer["kind"], calls, calls * roofline.cost(layer, 1, length).flops]
            for p in SERVED:
                row += [
                    calls * roofline.bytes_moved(layer, 1, length, p),
                    f"{roofline.intensity(layer, 1, length, p):.4g}",
                ]
            writer.writerow(row)


def describe_totals(record):
    """One line with its convention: the model's FLOPs, parameters, weight bytes."""
    t, c = record["totals"], record["counts"]
    return (
        f"{t['flops'] / 1e9:.3f} GFLOPs per text of {record['length']} tokens ({t['flops_per_token'] / 1e6:.1f} MFLOPs per token), "
        f"{t['matmul_flops'] / 1e9:.3f} of them in matmuls, as fvcore ({c['fvcore_macs']:,} multiply-adds) and torch count them; "
        f"{t['parameters']:,} parameters, {t['weight_bytes']['FP32'] / 1e6:.1f} MB in FP32; {record['convention']}"
    )
