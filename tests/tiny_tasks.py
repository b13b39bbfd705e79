"""Tiny checkpoints with the heads of three tasks, and their exports, made once for all tests that serve them."""

import torch
import transformers
from conftest import MINILM, run_here

import torch2onnx
from core import checkpoint
from tasks.table import TASKS

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TINY_TASKS = ("token-classification", "question-answering", "fill-mask")
LENGTH = 64  # of the question answerer's windows


def save_tiny(folder, auto_model, **others):
    """A tiny BERT with a head, whose weights are large enough to tell tokens apart, and MiniLM's tokenizer."""
    torch.manual_seed(1)
    config = transformers.BertConfig(vocab_size=30522, **SIZES, **others)
    model = getattr(transformers, auto_model).from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(checkpoint.packaged_folder()).save_pretrained(folder)
    return folder


def checkpoints_of(folder):
    """{task: its checkpoint}."""
    return {task: folder / "checkpoints" / f"tiny-{task}" for task in TINY_TASKS} | {"sentence-embedding": MINILM}


def make(folder):
    """Checkpoints and exports; that of MiniLM for sentences is real."""
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    for task in TINY_TASKS:
        others = labels if task == "token-classification" else {}
        save_tiny(folder / "checkpoints" / f"tiny-{task}", TASKS[task].auto_model, **others)
    for task, model in checkpoints_of(folder).items():
        options = ["--task", task, "--model", model, "--repository", folder / task]
        options += ["--max-length", LENGTH] if task == "question-answering" else []
        options += ["--hidden-state"] if task == "sentence-embedding" else []
        done = run_here(torch2onnx, *options)
        assert done.returncode == 0, done.stderr
