"""Which texts calibrate and which select: never one that measures quality, so that nothing is tested on what chose it."""

import hashlib
import sys

from core.files import TEXTS, evaluation_texts, read_texts, split_texts, spread
from core.tables import ATTENTION_MASK, INPUT_IDS
from core.tokens import encode
from tasks.examples import examples

MIN_TEXTS = 16  # four select, twelve calibrate
MIN_CALIBRATION_TOKENS = 256  # fewer do not show the outliers
SELECT_EVERY = 4


def text_key(text):
    """What two texts share that have the same tokens: spaces and case make no others."""
    return " ".join(text.split()).casefold()


def without_leaks(texts):
    """(texts once each and none that measures quality, {"duplicates", "quality_texts"} left out)."""
    quality = {text_key(text) for text in evaluation_texts()}
    once = {}
    for text in texts:
        once.setdefault(text_key(text), text)
    kept = [text for name, text in once.items() if name not in quality]
    return kept, {"duplicates": len(texts) - len(once), "quality_texts": len(once) - len(kept)}


def read_calibration_texts(file):
    """(texts that may calibrate, what was left out); file: None for the half of assets/texts.txt that may."""
    texts = read_texts(file, "--calibration-texts") if file else split_texts(read_texts(TEXTS))[0]
    texts, left_out = without_leaks(texts)
    if left_out["quality_texts"]:
        print(
            f"WARNING: {left_out['quality_texts']} calibration texts measure quality too; they are left out",
            file=sys.stderr,
        )
    if len(texts) < MIN_TEXTS:
        raise SystemExit(
            f"--calibration-texts: expected at least {MIN_TEXTS} different texts that do not measure quality, "
            f"found {len(texts)} in {file or TEXTS}; give more text"
        )
    return texts, left_out


def load_texts(file, tokenizer, card, max_selection_texts):
    """({name of the part: encoded texts}, facts for the record); exits if there is too little text."""
    texts, left_out = read_calibration_texts(file)
    texts, inputs = examples(card, texts), card["inputs"]
    cut = sum(bool(e.overflowing) for e in tokenizer.encode_batch(texts))
    if cut == len(texts):
        print(f"WARNING: all {cut} calibration texts are longer than the length; their ends were cut", file=sys.stderr)
    select = texts[SELECT_EVERY - 1 :: SELECT_EVERY]
    parts = {
        "calibration": encode(tokenizer, [t for i, t in enumerate(texts) if (i + 1) % SELECT_EVERY], inputs),
        "held_out": encode(tokenizer, select, inputs),  # smoothing and ranges are compared on them
        "selection": encode(tokenizer, spread(select, max_selection_texts), inputs),
    }
    tokens = int(parts["calibration"][ATTENTION_MASK].sum())
    if tokens < MIN_CALIBRATION_TOKENS:
        raise SystemExit(
            f"--calibration-texts: expected at least {MIN_CALIBRATION_TOKENS} tokens, found {tokens}; give more text"
        )
    digest = hashlib.sha256(parts["calibration"][INPUT_IDS].tobytes() + parts["selection"][INPUT_IDS].tobytes())
    facts = {"file": (file or TEXTS).name, "sha256": digest.hexdigest(), "left_out": left_out, "cut_at_length": cut}
    facts["calibration_tokens"] = tokens
    return parts, facts | {part: len(encoded[INPUT_IDS]) for part, encoded in parts.items()}
