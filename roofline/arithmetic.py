"""Precision by precision on a device, through torch alone: roofs, the batch that reaches them, and deviations.

TF32, FP16 and BF16 are what the device computes, not an emulation. What it cannot is null. The prediction that stands
beside a measured batch is that of waves.py with the roofs measured here, so that a data sheet's error is not in it.
"""

import contextlib
import copy
import sys

import numpy as np
import torch
from tqdm import tqdm

from core.files import TEXTS, read_texts, split_texts, spread
from core.metrics import deviations
from roofline import times
from roofline.model import cost
from roofline.waves import ROOF_SHARE, batch_reaching, group_threshold, linears

TYPES = {"FP32": torch.float32, "TF32": torch.float32, "FP16": torch.float16, "BF16": torch.bfloat16}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
LIKE = 2  # factor between a predicted and a measured batch that counts as agreement: batches are doubled
TEXT_COUNT = 32
GEMM_SIZE = {"cuda": 8192, "cpu": 1024}  # a small GEMM leaves a large GPU idle


@contextlib.contextmanager
def arithmetic(precision):
    """Let torch multiply in a precision: new tensors have its type, and FP32 is TF32 only where that is asked for."""
    before, allowed = torch.get_default_dtype(), torch.backends.cuda.matmul.allow_tf32
    torch.set_default_dtype(TYPES[precision])
    torch.backends.cuda.matmul.allow_tf32 = precision == "TF32"
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.backends.cuda.matmul.allow_tf32 = allowed


def precisions_on(device):
    """What a device multiplies in: TF32 needs tensor cores from compute capability 8.0 on, BF16 too."""
    if device == "cpu":
        return ["FP32", "FP16", "BF16"]
    ampere = torch.cuda.get_device_capability() >= (8, 0)
    return [p for p in TYPES if ampere or p not in ("TF32", "BF16")]


def measure_roofs(device, precisions, size, min_run_time_s):
    """{"peak_flops": {precision: of a square GEMM}, "copy": bytes/s read and written, "sms"}."""
    peaks = {}
    for precision in precisions:
        with arithmetic(precision):
            a, b = (torch.rand(size, size, device=device) for _ in range(2))
            peaks[precision] = 2 * size**3 / times.least_seconds(lambda: torch.mm(a, b), min_run_time_s)  # noqa: B023
    source = torch.rand(times.TRIAD_ELEMENTS, device=device)
    target = torch.empty_like(source)
    seconds = times.least_seconds(lambda: target.copy_(source), min_run_time_s)
    sms = torch.cuda.get_device_properties(0).multi_processor_count if device == "cuda" else None
    return {"peak_flops": peaks, "bandwidth": 2 * 4 * times.TRIAD_ELEMENTS / seconds, "sms": sms}


def measured_batch(layer, batches, length, device, peak, min_run_time_s):
    """([share of the peak at each batch], the batch from which on it is at least ROOF_SHARE up to the last; None without)."""
    shares = []
    for batch in batches:
        function, inputs, weights = times.make_call(layer, batch, length, device)
        turns = times.rotate((*inputs, *weights), device)
        seconds = times.least_seconds(lambda: function(*next(turns)), min_run_time_s)  # noqa: B023
        shares.append(cost(layer, batch, length).flops / seconds / peak)
    found = None
    for batch, share in reversed(list(zip(batches, shares, strict=True))):
        if share < ROOF_SHARE:
            break
        found = batch
    return shares, found


def compare_thresholds(kinds, length, device, roofs, batches, min_run_time_s):
    """A row for each kind of Linear and precision: ridge and predicted batch, the measured one, and whether they agree."""
    rows, machine = [], roofs | {"peak_flops": {"FP32": 0.0} | roofs["peak_flops"]}
    pairs = [(group, p) for group in linears(kinds) for p in roofs["peak_flops"]]
    for group, precision in tqdm(pairs, desc="thresholds", unit="layer", mininterval=1, file=sys.stderr):
        with arithmetic(precision):
            peak = roofs["peak_flops"][precision]
            shares, found = measured_batch(group[0], batches, length, device, peak, min_run_time_s)
        predicted = batch_reaching([group], length, precision, machine)
        rows.append(
            {
                "kind": group[0]["kind"],
                "precision": precision,
                "ridge": group_threshold(group, length, precision, machine),
                "predicted_batch": predicted,
                "measured_batch": found,
                "shares": shares,
                "agree": agree(predicted, found, batches),
            }
        )
    return rows


def agree(predicted, found, batches):
    """Whether two batches are within a factor of LIKE; what is beyond the last one counts as twice it."""
    beyond = 2 * batches[-1]
    predicted, found = (min(batch or beyond, beyond) for batch in (predicted, found))
    return max(predicted, found) <= LIKE * min(predicted, found)


def measure_deviations(embedder, encoded, device, precisions):
    """{precision: mean deviations over real tokens of the texts, from FP32 without TF32}; encoded: ids and mask, int64 [n, L]."""
    found, mask = {}, encoded[1].numpy()
    expected = outputs(embedder, encoded, device, "FP32")
    for precision in (p for p in precisions if p != "FP32"):
        answers = outputs(embedder, encoded, device, precision)
        try:
            rows = [deviations(expected[i : i + 1], answers[i : i + 1], mask[i : i + 1]) for i in range(len(mask))]
        except ValueError as error:  # not finite
            found[precision] = {"error": str(error)}
            continue
        found[precision] = {k: float(np.mean([row[k] for row in rows])) for k in ("relative_l2_error", "mean_cosine")}
    return found


def outputs(embedder, encoded, device, precision):
    """A copy of the embedder's answers in a precision, as float32, text by text: a batch may sum in another order."""
    with arithmetic(precision), torch.inference_mode():
        module = copy.deepcopy(embedder).to(device, TYPES[precision])
        answers = [module(*(part[i : i + 1].to(device) for part in encoded)) for i in range(len(encoded[0]))]
    return torch.cat(answers).float().cpu().numpy()


def measure_arithmetic(embedder, tokenizer, kinds, length, min_run_time_s, device):
    """{"roofs", "thresholds", "deviations", "texts"} of a device, beside what measure_layers returns."""
    precisions, batches = precisions_on(device), BATCHES
    texts = spread(split_texts(read_texts(TEXTS))[1], TEXT_COUNT)
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    found = measure_deviations(embedder, (encoded["input_ids"], encoded["attention_mask"]), device, precisions)
    with torch.inference_mode():
        roofs = measure_roofs(device, precisions, GEMM_SIZE[device], 10 * min_run_time_s)
        rows = compare_thresholds(kinds, length, device, roofs, batches, min_run_time_s)
    return {"roofs": roofs, "thresholds": rows, "batches": batches, "deviations": found, "texts": len(texts)}
