"""How the weights behind one tensor are rounded to INT8, and which channels are left out of it.

Sources: GPTQ, Frantar et al. 2023 (arXiv:2210.17323): what a row's rounding changes in the outputs is made up for by the
rows not yet rounded; LLM.int8(), Dettmers et al. 2022 (arXiv:2208.07339): a few channels of outliers in floating point.
"""

from collections import namedtuple

import ml_dtypes
import numpy as np

Form = namedtuple("Form", "largest dtype")  # numbers of eight bits
INT8 = Form(127, np.dtype(np.int8))  # symmetric: -128 is not used
FP8 = Form(448, np.dtype(ml_dtypes.float8_e4m3fn))
DAMPING = 0.1  # of the mean diagonal: calibration has few tokens for as many channels
BLOCK = 64  # rows that are rounded between two updates of all others


def round_values(values, scale, form=INT8):
    """Nearest values, in units of `scale`, that a form can hold; in FP32."""
    values = np.clip(values / scale, -form.largest, form.largest)
    return (np.rint(values) if form is INT8 else values.astype(form.dtype).astype(np.float32)) * scale


def channel_power(values, biased):
    """What the rounding of a channel's weights counts in the outputs; a bias takes their mean."""
    return values.var(axis=0) if biased else np.square(values).mean(axis=0)


def round_second_order(weight, scale, values, floating, form=INT8, biased=True):
    """(weight with its rows rounded to numbers of the form times `scale`, those of `floating` changed but not rounded).

    weight: float32 [in, out], scale: [out]; values: what the MatMul reads, [tokens, in]; floating: bool [in]. biased:
    whether a bias takes the mean of the outputs' errors, so that nothing has to make up for it.
    """
    # the largest first; those that stay floating take the rest
    order = np.lexsort((-channel_power(values, biased), floating))
    values = (values - values.mean(axis=0) if biased else values)[:, order]
    hessian = (values.T @ values).astype(np.float64)
    hessian[np.diag_indices_from(hessian)] += DAMPING * np.diag(hessian).mean() + np.finfo(np.float32).tiny
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T.astype(np.float32)
    rest, found, end = weight[order].astype(np.float32), np.empty(weight.shape, np.float32), int((~floating).sum())
    for start in range(0, end, BLOCK):
        stop = min(start + BLOCK, end)
        errors = np.empty((stop - start, weight.shape[1]), np.float32)
        for i in range(start, stop):
            found[i] = round_values(rest[i], scale, form)
            errors[i - start] = (rest[i] - found[i]) / factor[i, i]
            rest[i + 1 : stop] -= np.outer(factor[i, i + 1 : stop], errors[i - start])
        rest[stop:] -= factor[start:stop, stop:].T @ errors
    found[end:] = rest[end:]
    rounded = np.empty_like(found)
    rounded[order] = found
    return rounded


def outlier_channels(values, weight, power, count, biased=True):
    """bool [in]: the channels without which INT8 rounds the rest best, by the noise that uniform rounding predicts.

    values: [tokens, in]; weight: [in, out]; power: what an output's squared error counts, [out]. A channel is bad by
    its own step, by the step that it forces on all channels, and by those that its weights force on their outputs.
    """
    largest, spread = np.square(np.abs(values).max(axis=0)), channel_power(values, biased)
    gain, magnitude = np.square(weight) @ power, np.abs(weight)
    rows = np.argpartition(-magnitude, count + 1, axis=0)[: count + 2]  # of each output those that may come to be first
    floating = np.zeros(len(weight), dtype=bool)
    for _ in range(count):
        alive = np.where(floating[rows], 0, np.take_along_axis(magnitude, rows, axis=0))
        second, first = np.square(np.partition(alive, -2, axis=0)[-2:])
        at = np.take_along_axis(rows, alive.argmax(axis=0)[None], axis=0)[0]
        forced = np.bincount(at, weights=(first - second) * power, minlength=len(weight))
        saved = largest.max() * gain + forced * spread.sum() + spread * (first @ power)
        top = np.argsort(largest)[-2:]
        saved[top[1]] += (largest[top[1]] - largest[top[0]]) * gain.sum()
        worst = np.argmax(np.where(floating, -1, saved))
        floating[worst], largest[worst], spread[worst], gain[worst] = True, 0, 0, 0
    return floating
