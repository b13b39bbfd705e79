"""The table of GPUs: peaks and bandwidth of assets/hardware.csv, of the machine at hand, or of the user's own."""

import csv
import difflib
import math
import re
import sys

from core.files import ASSETS
from core.record import gpu_record
from core.tables import PRECISIONS

HARDWARE = ASSETS / "hardware.csv"
DEFAULT_GPU = "T4"
PEAKS = tuple(dict.fromkeys(row.peak for row in PRECISIONS.values()))  # FP32 is also the vector units'


def read_hardware(path=HARDWARE):
    """{name: gpu} of assets/hardware.csv; a gpu is {"name", "pattern", "peak_flops", "bandwidth", "l2_bytes", "sms", "source"}."""
    gpus = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            peaks = {name.split("_")[0].upper(): v for name, v in row.items() if name.endswith(("_tflops", "_tops"))}
            gpus[row["gpu"]] = {
                "name": row["gpu"],
                "pattern": row["name_pattern"],
                "peak_flops": {p: float(v) * 1e12 if v else None for p, v in peaks.items()},
                "bandwidth": float(row["bandwidth_gb_s"]) * 1e9,
                "l2_bytes": float(row["l2_mb"]) * 1e6,
                "sms": int(row["sms"]),
                "source": row["source"],
            }
    return gpus


def find_gpu(name, gpus):
    """The row of a GPU: by name, else the one in this machine, else DEFAULT_GPU; exits for an unknown name."""
    if name is None:
        found = (gpu_record() or {}).get("name", "")
        known = [g for g in gpus.values() if re.search(g["pattern"], found, re.IGNORECASE)]
        if found and not known:
            print(f"{found}: not in {HARDWARE.name}, {DEFAULT_GPU} is taken; see --peak-tflops", file=sys.stderr)
        return known[0] if known else gpus[DEFAULT_GPU]
    key = plain(name)
    by_key = {plain(n): n for n in gpus}
    if key in by_key:
        return gpus[by_key[key]]
    near = [n for k, n in by_key.items() if key and (key in k or k in key)]
    near += [by_key[k] for k in difflib.get_close_matches(key, by_key, n=4, cutoff=0.4) if by_key[k] not in near]
    raise SystemExit(
        f"--gpu: expected a GPU of {HARDWARE.name}, found {name}; near it: {', '.join(near or gpus)}; "
        "their peaks: --list-gpus; one of your own: --peak-tflops, --bandwidth-gb-s"
    )


def precisions_of(gpu):
    """Those that a GPU has a peak for in its Linears."""
    return [p for p, row in PRECISIONS.items() if gpu["peak_flops"].get(row.peak)]


def having(precision):
    """Names of the GPUs of the table that have what multiplies in a precision's Linears."""
    return [name for name, gpu in read_hardware().items() if precision in precisions_of(gpu)]


def check_precisions(asked, gpu):
    """Exit where the GPU has no tensor cores for a precision that is asked for, with the GPUs that have."""
    for precision in asked:
        if precision not in precisions_of(gpu):
            raise SystemExit(
                f"--precisions {precision}: expected a GPU that has it, found {gpu['name']}; take --gpu with one of "
                f"{', '.join(having(precision))}"
            )


def plain(name):
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("nvidia", "").replace("geforce", "").replace("tesla", ""))


def own_gpu(peaks, bandwidth_gb_s, name):
    """A row of the user's own. peaks: "8.1" for every precision, or several of "FP16=65", in TFLOP/s."""
    found = dict.fromkeys(PEAKS)
    for text in peaks:
        precision, _, value = text.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = 0.0
        if not 0 < number < math.inf or (precision and precision.upper() not in PEAKS):
            raise SystemExit(
                f"--peak-tflops: expected a number above 0, or PRECISION=NUMBER with {', '.join(PEAKS)}, found {text}"
            )
        found |= dict.fromkeys([precision.upper()] if precision else PEAKS, number * 1e12)
    if found["FP32"] is None:
        raise SystemExit(f"--peak-tflops: expected FP32=NUMBER too, the vector units' peak, found {' '.join(peaks)}")
    if not 0 < bandwidth_gb_s < math.inf:
        raise SystemExit(f"--bandwidth-gb-s: expected a number above 0, found {bandwidth_gb_s:g}")
    return {
        "name": name or "own",
        "pattern": None,
        "peak_flops": found,
        "bandwidth": bandwidth_gb_s * 1e9,
        "l2_bytes": None,
        "sms": None,
        "source": "--peak-tflops, --bandwidth-gb-s",
    }


def describe_gpu(gpu):
    """One line: name, dense peaks, bandwidth, source."""
    peaks = ", ".join(f"{p} {v / 1e12:g}" for p, v in gpu["peak_flops"].items() if v)
    return f"{gpu['name']:15} TFLOP/s (INT8: TOP/s): {peaks}; {gpu['bandwidth'] / 1e9:g} GB/s; {gpu['source']}"
