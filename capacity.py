#!/usr/bin/env python3
"""Say how many replicas of a service a load needs, and how many machine hours a job takes, from what was measured.

Reads:  results/<model>/<machine>/perf.json with rates (./perf.py --rates), and where they are there length.json,
        peers.json, embed.json (embed.py's record) and complexity.json; assets/hardware.csv.
Writes: nothing.
Run:    ./capacity.py --model minilm-sst2 --a-day 1e6 --peak-factor 5 --p99-ms 100 --texts 1e10
Prints: every rate that was measured and whether it meets the target; replicas, with one to spare; what a start and a
        longer text cost; machine hours for --texts. Exits 1 where no rate meets the target.

The rate of a replica is the highest that was measured up to which every rate meets the target, as it was answered. A
replica is a machine like the one that was measured. Nothing is interpolated or simulated: what was not measured is
called so, with the command that measures it. Only a GPU's hours are computed, and are a bound.
"""

import argparse
from pathlib import Path

from core.arguments import make_parser
from core.files import RESULTS
from reporting import capacity
from roofline.gpus import find_gpu, read_hardware

DAY_S = 86400


def positive(text):
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
    return value


def parse_args():
    parser = make_parser(__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="folder's name in results/")
    which.add_argument("--repository", type=Path, help="an export, whose results are taken")
    parser.add_argument("--machine", help="folder's name in results/<model>/, where several machines were measured")
    parser.add_argument("--served", default="ensemble", help="model in perf.json (default: the whole service)")
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--rps", type=positive, help="requests per second at the peak")
    load.add_argument("--a-day", type=positive, help="requests a day, with --peak-factor")
    parser.add_argument("--peak-factor", type=positive, help="peak ÷ mean of a day: your own traffic says it")
    parser.add_argument("--p99-ms", type=positive, help="latency that 99 of 100 requests must keep")
    parser.add_argument(
        "--start-s", type=positive, help="from a replica's start to its first answer, where you know it"
    )
    parser.add_argument("--texts", type=positive, help="texts that are computed once")
    parser.add_argument("--gpu", help="a row of assets/hardware.csv (default: the GPU of this machine, else T4)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if (args.a_day is None) != (args.peak_factor is None):
        parser.error("--a-day, --peak-factor: expected both or neither")
    args.peak = args.rps or (args.a_day and args.a_day / DAY_S * args.peak_factor)
    if (args.peak is None) != (args.p99_ms is None) or not (args.peak or args.texts):
        parser.error("expected --rps (or --a-day) with --p99-ms, or --texts, or all")
    return args


def find_records(args):
    """The records of the model on one machine; those with rates come before others."""
    slug, sha256 = args.model, None
    if args.repository:
        from core.repository import read_card  # onnx takes a while to import

        card = read_card(args.repository)
        slug, sha256 = card["slug"], card["reference_sha256"]
    folders = {path.parent for kind in ("perf", "length") for path in args.results.glob(f"{slug}/*/{kind}.json")}
    found = {f.name: capacity.read_records(f) for f in sorted(folders) if args.machine in (None, f.name)}
    found = {name: r for name, r in found.items() if sha256 in (None, capacity.card_of(r).get("reference_sha256"))}
    found = {name: r for name, r in found.items() if capacity.rates_of(r, args.served)} or found
    if not found:
        raise SystemExit(
            f"{args.results / slug}: expected results of this export{' on that machine' if args.machine else ''}, "
            f"found none; {capacity.MEASURE_RATES} measures it"
        )
    if len(found) > 1:
        raise SystemExit(
            f"{args.results / slug}: expected one machine, found {', '.join(found)}; choose with --machine"
        )
    return next(iter(found.values()))


def main():
    args = parse_args()
    gpu = find_gpu(args.gpu, read_hardware())
    records = find_records(args)
    lines, rates, best = [capacity.describe_source(records, args.served)], capacity.rates_of(records, args.served), None
    if args.peak:
        a_day = f" ({args.a_day:,.0f} a day, × {args.peak_factor:g})" if args.a_day else ""
        lines.append(
            f"target: {capacity.number(args.peak)} requests/s at the peak{a_day}, p99 at most {args.p99_ms:g} ms"
        )
        lines += capacity.describe_rates(rates, args.p99_ms) if rates else ()
        best = capacity.highest_rate(rates, args.p99_ms)
    if best:
        needed = capacity.replicas_needed(best, args.peak)
        start = (args.start_s, "as typed") if args.start_s else capacity.measured_start(records)
        lines.append(capacity.describe_replicas(best, needed, args.peak))
        lines.append(capacity.describe_start(start, args.peak / needed))
    lines += capacity.describe_lengths(records["length"])
    if args.texts:
        lines += capacity.bulk(records, args.served, args.texts) + capacity.gpu_bounds(records, args.texts, gpu)
    print(*lines, sep="\n")
    if args.peak and not best:
        raise SystemExit(capacity.refusal(rates, args.served, args.p99_ms))


if __name__ == "__main__":
    main()
