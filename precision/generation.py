"""FP16 graphs of a service that generates, made and checked on real steps of its own loop."""

import contextlib

import numpy as np
import onnx

from core.files import replace_when_done, spread
from core.generation import Wish, generate
from core.onnx_runtime import open_session
from core.repository import graph_tensors, read_graph
from core.tables import FLOAT_GATE
from core.tokens import load_tokenizer
from precision.makers import lower
from serving.generation import graph_paths

STEPS, TEXTS = 4, 8  # tokens and texts of which the values show what leaves FP16's range
GATE = FLOAT_GATE["relative_l2_error"]


def write_fp16(repository, card, texts):
    """Make, check and write every graph in FP16, all or none; returns the paths."""
    sources, targets = graph_paths(repository, card), graph_paths(repository, card, "FP16")
    references = {graph: read_graph(path) for graph, path in sources.items()}
    tokenizer = load_tokenizer(repository / card["service"]["name"] / "tokenizer.json")
    prompts = [tokenizer.encode(text).ids[: card["max_length"]] for text in spread(texts, TEXTS)]
    samples = record_steps(references, card["generation"], [ids for ids in prompts if ids])
    notes = {"precision": "FP16", "reference_sha256": card["reference_sha256"]}
    with contextlib.ExitStack() as stack:
        for graph, reference in references.items():
            made = lower(reference, [feeds for feeds, _ in samples[graph]], "fp16")
            check_graph(targets[graph], made, reference, samples[graph])
            onnx.helper.set_model_props(made, notes)
            onnx.save(made, stack.enter_context(replace_when_done(targets[graph])))
    return list(targets.values())


def record_steps(references, settings, prompts):
    """{graph: [(inputs, outputs in the order of the graph)]} of a few steps of the loop, prompt and past included."""
    sessions = {graph: open_session(reference) for graph, reference in references.items()}
    samples = {graph: [] for graph in references}

    def run(graph, feeds):
        found = sessions[graph].run(None, feeds)
        samples[graph].append((feeds, found))
        return dict(zip([output.name for output in sessions[graph].get_outputs()], found, strict=True))

    for _ in generate(run, settings, prompts, [Wish(STEPS)] * len(prompts)):
        pass
    return samples


def check_graph(path, made, reference, samples):
    """Exit unless a graph has the reference's tensors, and answers as it does on every sample."""
    if graph_tensors(made) != graph_tensors(reference):
        raise SystemExit(
            f"{path}: expected the reference's tensors, {graph_tensors(reference)}; found {graph_tensors(made)}; "
            "report it with the model's name"
        )
    session = open_session(made)
    for feeds, expected in samples:
        for values, found in zip(expected, session.run(None, feeds), strict=True):
            error = float(np.linalg.norm(found - values) / max(np.linalg.norm(values), 1e-12))
            if not error <= GATE:  # NaN must not pass
                raise SystemExit(
                    f"{path}: expected at most {GATE:g} relative L2 error to FP32 on the project's texts, found "
                    f"{error:.3g}; no FP16 graph was left; serve FP32"
                )
