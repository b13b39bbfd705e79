#!/usr/bin/env python3
"""Fine-tune a text encoder to answer questions about a text, on generated stories of invented people.

Reads:  examples/question_templates.json; the encoder: packaged MiniLM, a local folder or a model hub id.
Writes: --output, a Hugging Face checkpoint (AutoModelForQuestionAnswering) with tokenizer and training.json.
Run:    ./examples/train_question_answering.py --threads 2
Prints: exact match and F1 on stories whose wordings, names and values the training never saw.

No question-answering weights come in a pip package; these show the service with true answers. The checkpoint answers
questions of the templates' kind and is no general question answerer. Questions that the text does not answer are
trained to point at the first token, as in SQuAD 2.
"""

import random
import re
import string
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's modules, from wherever it is called

from core.arguments import PACKAGED_MODEL, add_training_arguments, check_training_arguments, make_parser
from core.files import ROOT, read_json, sha256
from core.record import environment_record

TEMPLATES = Path(__file__).with_name("question_templates.json")
LABEL = "trained on this project's templates; answers questions of their kind"
MAX_SENTENCES = 8
MAX_ANSWER = 12  # tokens
NEUTRAL_SHARE = 0.15  # of the sentences, about nobody
UNANSWERABLE_SHARE = 0.2  # of the questions
HELD_OUT_EVERY = 3  # of names and other values
SHORT = 8  # a list of fewer values, such as the weekdays, is in both halves
HELD_OUT, HELD_OUT_QUICK = 500, 40  # questions


def split_templates(templates, held_out):
    """The half for training, or the held-out half: no statement, question, name or value is in both."""

    def part(values):
        if len(values) < SHORT:
            return values
        return [v for i, v in enumerate(values) if (i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == held_out]

    def wordings(values):
        return values[-1:] if held_out else values[:-1]

    facts = [
        {
            "statements": wordings(fact["statements"]),
            "questions": {slot: wordings(questions) for slot, questions in fact["questions"].items()},
        }
        for fact in templates["facts"]
    ]
    values = {slot: [part(choices) for choices in parts] for slot, parts in templates["values"].items()}
    return {"facts": facts, "neutral": part(templates["neutral"]), "values": values}


def draw(rng, values, slot, used):
    """A value of a slot that the story does not have yet, so that a question has one answer."""
    slot = rng.choice(("woman", "man")) if slot in ("person", "partner") else slot
    while True:
        value = " ".join(rng.choice(part) for part in values[slot])
        if value not in used:
            used.add(value)
            return value, slot


def fill(rng, templates, fact, used, person):
    """{slot: value} for all that a fact's statements and questions name."""
    slots = set(re.findall(r"{(\w+)}", " ".join(fact["statements"] + sum(fact["questions"].values(), []))))
    return {"person": person} | {s: draw(rng, templates["values"], s, used)[0] for s in sorted(slots - {"person"})}


def find_value(sentence, value):
    """Where a value stands in a sentence, as a whole word: (start, end), or None."""
    found = re.search(rf"(?<!\w){re.escape(value)}(?!\w)", sentence, re.IGNORECASE)
    return found and found.span()


def use_pronoun(sentence, person, kind):
    """The sentence with a pronoun in the place of the name that it begins with."""
    subject, owner = ("She", "Her") if kind == "woman" else ("He", "His")
    for start, pronoun in ((f"{person}'s ", owner), (f"{person} ", subject)):
        if sentence.startswith(start) and not sentence.startswith(f"{person} and "):
            return f"{pronoun} {sentence.removeprefix(start)}"
    return sentence


def tell_story(rng, templates, sentences):
    """[(sentence, person, fact, values)] about two or three people; a neutral sentence has no person."""
    used, story = set(), []
    people = [draw(rng, templates["values"], "person", used) for _ in range(rng.choice((2, 3)))]
    pairs = [(person, i) for person in people for i in range(len(templates["facts"]))]
    chosen = rng.sample(pairs, sentences)
    if rng.random() < 0.5:  # one person after the other, as a text is written
        chosen.sort(key=lambda pair: pair[0])
    previous = None
    for (person, kind), i in chosen:
        if story and rng.random() < NEUTRAL_SHARE:
            story.append((rng.choice(templates["neutral"]), None, None, {}))
            previous = None
            continue
        fact = templates["facts"][i]
        values = fill(rng, templates, fact, used, person)
        sentence = rng.choice(fact["statements"]).format(**values)
        if person == previous and rng.random() < 0.5:
            sentence = use_pronoun(sentence, person, kind)
        story.append((sentence[0].upper() + sentence[1:], person, fact, values))
        previous = person
    return story, used


def make_example(rng, templates):
    """(question, context, start, end) with the answer's characters in the context; (0, 0) where it has none."""
    story, used = tell_story(rng, templates, rng.randint(1, MAX_SENTENCES))
    context = " ".join(sentence for sentence, *_ in story)
    told = [entry for entry in story if entry[1]]
    sentence, person, fact, values = rng.choice(told)
    if rng.random() < UNANSWERABLE_SHARE:
        # a fact that the story tells of somebody else is the hardest to refuse
        own = [entry[2] for entry in told if entry[1] == person]
        others = [entry[2] for entry in told if entry[2] not in own] or [f for f in templates["facts"] if f not in own]
        fact = rng.choice(others)
        values = fill(rng, templates, fact, used, person)
        question = rng.choice(rng.choice(list(fact["questions"].values())))
        return question.format(**values), context, 0, 0
    # the person is no answer where the sentence has a pronoun
    slots = [slot for slot in fact["questions"] if find_value(sentence, values[slot])]
    slot = rng.choice(slots)
    start, end = find_value(sentence, values[slot])
    offset = context.index(sentence)
    return rng.choice(fact["questions"][slot]).format(**values), context, offset + start, offset + end


def make_examples(seed, count, held_out):
    """Examples of one half of the templates, the same for the same seed."""
    templates = split_templates(read_json(TEMPLATES, "restore it from git"), held_out)
    rng = random.Random(seed)
    return [make_example(rng, templates) for _ in range(count)]


# --- model -------------------------------------------------------------------------------


def tokenize(tokenizer, examples, args):
    """Questions with contexts as the model takes them: BatchEncoding of tensors [batch, length]."""
    questions, contexts = [e[0] for e in examples], [e[1] for e in examples]
    cut = {"truncation": "only_second", "max_length": args.max_length}
    return tokenizer(questions, contexts, padding=True, return_tensors="pt", **cut)


def add_targets(tokens, examples):
    """The batch with the tokens where each answer starts and ends; token 0 where there is none, or it is cut off."""
    import torch

    def position(row, character):
        return tokens.char_to_token(row, character, sequence_index=1) or 0

    starts = [position(i, start) if end else 0 for i, (_, _, start, end) in enumerate(examples)]
    ends = [position(i, end - 1) if end else 0 for i, (_, _, _, end) in enumerate(examples)]
    return {**tokens, "start_positions": torch.tensor(starts), "end_positions": torch.tensor(ends)}


def train(model, tokenizer, examples, args):
    """One pass over the examples; returns the mean loss of the last tenth of the steps."""
    import numpy as np
    from tqdm import tqdm

    from tasks.training import make_batches, make_optimizer, take_step

    optimizer, schedule = make_optimizer(model, args.learning_rate, args.steps)
    batches = make_batches([e[1] for e in examples], args.batch_size, np.random.default_rng(args.seed))
    model.train()
    losses = []
    for batch in tqdm(batches, desc="training", unit="step", mininterval=1, file=sys.stderr):
        batch = [examples[i] for i in batch]
        tensors = add_targets(tokenize(tokenizer, batch, args), batch)
        losses.append(take_step(model, tensors, optimizer, schedule))
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def best_span(start, end, in_context):
    """(first, last) token of the best answer, or None where no answer is better.

    start, end: float [length], the logits; in_context: bool [length]. A span's score is start + end; that of no
    answer is the first token's.
    """
    import numpy as np

    length = len(start)
    allowed = np.triu(np.outer(in_context, in_context)) & ~np.triu(np.ones((length, length), bool), MAX_ANSWER)
    scores = np.where(allowed, start[:, None] + end[None, :], -np.inf)
    first, last = np.unravel_index(scores.argmax(), scores.shape)
    return None if scores[first, last] <= start[0] + end[0] else (int(first), int(last))


def answer(model, tokenizer, examples, args):
    """The model's answer to each example as text of its context; "" for none."""
    import numpy as np
    import torch

    model.eval()
    answers = []
    for row in range(0, len(examples), args.batch_size):
        batch = examples[row : row + args.batch_size]
        tokens = tokenize(tokenizer, batch, args)
        with torch.inference_mode():
            result = model(**tokens)
        for i, (_, context, *_) in enumerate(batch):
            in_context = np.array([part == 1 for part in tokens.sequence_ids(i)])
            span = best_span(result.start_logits[i].numpy(), result.end_logits[i].numpy(), in_context)
            edges = [tokens.token_to_chars(i, token) for token in span or ()]
            answers.append(context[edges[0].start : edges[1].end] if edges else "")
    return answers


# --- quality -----------------------------------------------------------------------------


def normalise(text):
    """Words as SQuAD's evaluation compares them: lower case, no punctuation, no articles."""
    words = text.lower().translate(str.maketrans("", "", string.punctuation)).split()
    return [word for word in words if word not in ("a", "an", "the")]


def word_f1(answer, expected):
    """Harmonic mean of precision and recall of the answer's words; no answer matches only no answer."""
    answer, expected = normalise(answer), normalise(expected)
    if not answer or not expected:
        return float(answer == expected)
    return 2 * sum((Counter(answer) & Counter(expected)).values()) / (len(answer) + len(expected))


def measure_quality(answers, expected):
    """{"questions", "exact_match", "f1"} of all, and of the answerable and the unanswerable questions apart."""

    def mean(pairs):
        count = len(pairs)
        exact = sum(normalise(a) == normalise(e) for a, e in pairs)
        f1 = sum(word_f1(a, e) for a, e in pairs)
        return {"questions": count, "exact_match": exact / count, "f1": f1 / count} if count else None

    pairs = list(zip(answers, expected, strict=True))
    kinds = {"answerable": [p for p in pairs if p[1]], "unanswerable": [p for p in pairs if not p[1]]}
    return mean(pairs) | {kind: mean(part) for kind, part in kinds.items()}


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=PACKAGED_MODEL, help="the encoder (default: %(default)s)")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    output = ROOT / "build" / "qa-checkpoint"
    add_training_arguments(parser, output, steps=400, batch_size=16, learning_rate=5e-4)
    args = parser.parse_args()
    check_training_arguments(parser, args)
    args.max_length = 256  # tokens, more than the longest story has
    args.random_weights = args.packaged_if_offline = False
    return args


def main():
    args = parse_args()
    # torch and transformers take seconds: not before the arguments are known to be good
    import torch
    from transformers import AutoModelForQuestionAnswering

    from tasks.training import load_encoder, save_checkpoint

    if args.threads:
        torch.set_num_threads(args.threads)
    model, tokenizer, card = load_encoder(args, AutoModelForQuestionAnswering)
    examples = make_examples(args.seed, args.steps * args.batch_size, held_out=False)
    held_out = make_examples("held out", HELD_OUT_QUICK if args.quick else HELD_OUT, held_out=True)
    started = time.perf_counter()
    loss = train(model, tokenizer, examples, args)
    answers = answer(model, tokenizer, held_out, args)
    quality = measure_quality(answers, [context[start:end] for _, context, start, end in held_out])
    record = {"label": LABEL, "encoder": card, "templates_sha256": sha256(TEMPLATES), "held_out": quality}
    record |= {"steps": args.steps, "batch_size": args.batch_size, "learning_rate": args.learning_rate}
    record |= {"seed": args.seed, "loss": loss, "seconds": round(time.perf_counter() - started, 1)}
    save_checkpoint(args.output, model, tokenizer, record | {"environment": environment_record()})
    for kind, part in (("all", quality), *((k, quality[k]) for k in ("answerable", "unanswerable"))):
        print(f"{kind}: exact match {part['exact_match']:.3f}, F1 {part['f1']:.3f} on {part['questions']} questions")
    print(f"{args.output}: {LABEL}")


if __name__ == "__main__":
    main()
