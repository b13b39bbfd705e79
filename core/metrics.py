"""How far an answer is from the reference's."""

import numpy as np


def deviations(reference, candidate, mask):
    """Differences of an embedder's EMBEDDING from the reference, over real tokens.

    reference, candidate: float arrays [batch, length, outputs]; mask: [batch, length],
    1 for a real token, 0 for padding. Returns a dict: max_abs_error, mean_abs_error,
    relative_l2_error (norm of the difference / norm of the reference), mean_cosine
    (mean over tokens of the cosine of the two vectors), argmax_flip_share (tokens whose
    largest output is another one) and tokens (how many were compared). Raises
    ValueError when shapes differ, no token is real, or a value is NaN or infinite.
    """
    if reference.shape != candidate.shape:
        raise ValueError(f"expected shape {list(reference.shape)}, found {list(candidate.shape)}")
    real = mask.astype(bool)
    reference, candidate = reference[real].astype(np.float64), candidate[real].astype(np.float64)
    if not len(reference):
        raise ValueError("expected at least one real token, found none")
    for name, values in (("reference", reference), ("candidate", candidate)):
        broken = int((~np.isfinite(values)).any(axis=1).sum())
        if broken:
            raise ValueError(f"NaN or Inf in {broken} of {len(values)} tokens of the {name}")
    difference = candidate - reference
    norms = np.linalg.norm(reference, axis=1) * np.linalg.norm(candidate, axis=1)
    cosine = (reference * candidate).sum(axis=1) / np.maximum(norms, np.finfo(np.float64).tiny)
    return {
        "max_abs_error": float(np.abs(difference).max()),
        "mean_abs_error": float(np.abs(difference).mean()),
        "relative_l2_error": float(np.linalg.norm(difference) / np.linalg.norm(reference)),
        "mean_cosine": float(cosine.mean()),
        "argmax_flip_share": float((reference.argmax(axis=1) != candidate.argmax(axis=1)).mean()),
        "tokens": len(reference),
    }
