"""Plain texts as a task's requests: for the check of an export, warm-up, and calibration."""

import importlib

from core.tables import CONTEXT
from tasks.table import TASKS

TAB = "\t"


def answers_of(task):
    """The module that makes a task's answers, or None."""
    name = TASKS[task].answers
    return importlib.import_module(f"serving.models.answers.{name}") if name else None


def examples(card, texts):
    """What the tokenizer takes of each text: the text, with a mask token in it, or a question and its context.

    A question and its context may stand in one line, a tab between them; else the text's first words are the question.
    """
    task = TASKS[card["task"]]
    if CONTEXT in task.takes:
        pairs = (text.partition(TAB) for text in texts)
        return [(first, rest) if tab else (" ".join(first.split()[:6])[:40] + "?", first) for first, tab, rest in pairs]
    if "mask_token" in card:
        return [with_mask(text, card["mask_token"]) for text in texts]
    return list(texts)


def with_mask(text, mask):
    """The text with its middle word masked, unless a word is masked already."""
    if mask in text:
        return text
    words = text.split() or [mask]
    return " ".join([*words[: len(words) // 2], mask, *words[len(words) // 2 + 1 :]])
