"""Every architecture of encoders with a head of every task: exported, made into all precisions, executed, compiled.

By default each architecture meets one task and each task two architectures or more; ALL_PAIRS=1 ./test.sh tries all.
"""

import json
import os

import numpy as np
import pytest
import torch
import transformers
from conftest import run_here

import compile_check
import quantize
import torch2onnx
from core import checkpoint
from core.repository import graph_path, present, read_card, read_graph, tokenizer_path
from core.tables import MAX_BATCH_SIZE
from core.tokens import encode, load_tokenizer
from precision.int8_search import run_graph
from tasks.examples import examples
from tasks.table import OWN, TASKS

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
CONFIGS = {
    "BERT": lambda: transformers.BertConfig(**SIZES),
    "RoBERTa": lambda: transformers.RobertaConfig(**SIZES, pad_token_id=0),
    "XLM-R": lambda: transformers.XLMRobertaConfig(**SIZES, pad_token_id=0),
    "DistilBERT": lambda: transformers.DistilBertConfig(**DISTILBERT),
    "ELECTRA": lambda: transformers.ElectraConfig(**SIZES, embedding_size=16),
    "ALBERT": lambda: transformers.AlbertConfig(**SIZES, embedding_size=16),
    "MPNet": lambda: transformers.MPNetConfig(**SIZES, pad_token_id=0),
    "DeBERTa-v2": lambda: transformers.DebertaV2Config(
        **SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=16, norm_rel_ebd="layer_norm"
    ),
    "ModernBERT": lambda: transformers.ModernBertConfig(
        **SIZES,
        pad_token_id=0,
        local_attention=16,
        cls_token_id=101,
        sep_token_id=102,
        bos_token_id=101,
        eos_token_id=102,
    ),
}
ENCODER_TASKS = [task for task, row in TASKS.items() if task != OWN]
PAIRS = [(name, task) for name in CONFIGS for task in ENCODER_TASKS]
if not os.environ.get("ALL_PAIRS"):
    PAIRS = [(name, ENCODER_TASKS[i % len(ENCODER_TASKS)]) for i, name in enumerate(CONFIGS)]


def save(folder, config, task):
    """A tiny checkpoint with the task's head, and MiniLM's tokenizer."""
    config.vocab_size = 30522
    if TASKS[task].labelled:
        config.id2label = {0: "O", 1: "B-ONE", 2: "B-TWO"}
        config.label2id = {name: i for i, name in config.id2label.items()}
    torch.manual_seed(0)
    model = getattr(transformers, TASKS[task].auto_model).from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(checkpoint.packaged_folder()).save_pretrained(folder)


@pytest.mark.parametrize(("name", "task"), PAIRS, ids=[f"{name} {task}" for name, task in PAIRS])
def test_an_architecture_goes_the_whole_way(tmp_path, name, task):
    folder, service, results = tmp_path / "checkpoint", tmp_path / "service", tmp_path / "results"
    save(folder, CONFIGS[name](), task)
    places = ("--repository", service, "--results", results)
    steps = (
        (torch2onnx, "--task", task, "--model", folder),
        (quantize, "--naive"),
        (compile_check, "--architectures", "SM86"),
    )
    for script, *options in steps:
        done = run_here(script, *options, *places)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    card = read_card(service)
    tokenizer, texts = load_tokenizer(tokenizer_path(service)), ["A short text.", "One more"] * MAX_BATCH_SIZE
    encoded = encode(tokenizer, examples(card, texts), card["inputs"])
    for key in present(service):
        assert np.isfinite(run_graph(read_graph(graph_path(service, key)), encoded, TASKS[task])).all()
    (record,) = results.glob("*/*/compile.json")
    rows = json.loads(record.read_text())["rows"]
    assert len(rows) == 5 and not any(row["error"] for row in rows)
