"""The export of a torch module to ONNX, and its check with ONNX Runtime: the same for every task."""

import ast
import contextlib
import io
import logging
import warnings

import numpy as np
import onnx
import torch

from core.checkpoint import sample_input
from core.onnx_runtime import open_session
from core.tables import ATTENTION_MASK, STARTS
from core.tokens import encode

OPSET = 19
CHECK_BATCHES = (1, 3, 8)
TRACED_LENGTH = 16  # of a dynamic length, for the run that the exporter records


def export_onnx(module, card, path):
    """Module -> ONNX; batch dynamic, length fixed or dynamic. The file's content depends on the input alone."""
    length = card["max_length"] if card["fixed_length"] else min(TRACED_LENGTH, card["max_length"])
    axes = {0: "batch"} | ({} if card["fixed_length"] else {1: "length"})
    axes = {"tensors": tuple(axes for _ in card["inputs"])}
    trace_onnx(module, sample_input(card["inputs"], 2, length), axes, card["inputs"], list(card["outputs"]), path)


def export_packed(module, feeds, card, path):
    """PackedGraph -> ONNX; feeds: int64 arrays of a few packed texts, as core.runner.pack makes them."""
    axes = {"tensors": tuple({0: "texts" if name == STARTS else "tokens"} for name in feeds)}
    sample = tuple(map(torch.from_numpy, feeds.values()))
    trace_onnx(module, sample, axes, list(feeds), list(card["outputs"]), path)


def trace_onnx(module, sample, axes, inputs, outputs, path):
    """Module -> ONNX, traced on the tensors of `sample`; axes: those that are dynamic, as torch.export takes them."""
    # the exporter warns about its own use of torch; its optimizer logs a reshape that it gives up to fold
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            sample,
            str(path),
            dynamo=True,
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=axes,
            external_data=False,
            verbose=False,
        )
    graph = onnx.load(path)
    name_nodes(graph)
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, path)


def name_nodes(model):
    """Name nodes by the module they come from, and drop the exporter's notes.

    transformer.encoder.layer.0.attention.self.query/MatMul says more in a profile than
    node_MatMul_69; the notes hold this machine's paths.
    """
    used = {}
    for node in model.graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
        modules = [scope for scope in ast.literal_eval(scopes)[:-1] if scope and not scope.startswith("_")]
        name = f"{modules[-1] if modules else 'graph'}/{node.op_type}"
        used[name] = used.get(name, 0) + 1
        node.name = name if used[name] == 1 else f"{name}_{used[name]}"
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.value_info, *model.graph.initializer, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]
        value.doc_string = ""
    del model.metadata_props[:]
    del model.graph.metadata_props[:]


def export_torchscript(module, card, path):
    """Module -> TorchScript, traced: the checkpoint as Triton's PyTorch backend takes it."""
    length = card["max_length"] if card["fixed_length"] else min(TRACED_LENGTH, card["max_length"])
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # torch.jit is no longer developed; a trace warns of each constant
        logging.getLogger("transformers").setLevel(logging.ERROR)  # of a loss: the trace looks at every attribute
        script = torch.jit.trace(module, sample_input(card["inputs"], 2, length), strict=False, check_trace=False)
        torch.jit.save(torch.jit.freeze(script), str(path))


def open_graph(path, outputs):
    """A function from feeds to the outputs of an ONNX graph, or of a TorchScript where the file is none."""
    if path.suffix != ".pt":
        session = open_session(path)
        return lambda feeds: session.run(outputs, feeds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.load(path)

    def run(feeds):
        with torch.inference_mode():
            found = script(*map(torch.from_numpy, feeds.values()))
        return [o.numpy() for o in ([found] if isinstance(found, torch.Tensor) else found)]

    return run


def check_export(module, tokenizer, card, examples, path, max_error):
    """A graph or a TorchScript against torch on short, long and padded texts. Returns the worst error; exits above max_error.

    examples: as encode takes them, the longest last.
    """
    run, worst = open_graph(path, list(card["outputs"])), 0.0
    for batch in CHECK_BATCHES:
        step = max(1, len(examples) // batch)
        feeds = encode(tokenizer, examples[-1:] if batch == 1 else examples[::step][:batch], card["inputs"])
        with torch.inference_mode():
            expected = module(*(torch.from_numpy(values) for values in feeds.values()))
        expected = [expected] if isinstance(expected, torch.Tensor) else expected
        for output, found in zip(expected, run(feeds), strict=True):
            same = found.shape == output.shape
            difference = np.abs(found - output.numpy()) if same else np.full(1, np.inf)
            # nobody reads what stands behind padding
            error = float(difference[feeds[ATTENTION_MASK] > 0].max() if same and found.ndim == 3 else difference.max())
            if not error <= max_error:  # NaN must not pass
                raise SystemExit(
                    f"{path}: expected at most {max_error:g} max abs error to torch at batch {batch}, found {error:g}; "
                    "no model was left in the repository; try another torch or onnxruntime version"
                )
            worst = max(worst, error)
    return worst
