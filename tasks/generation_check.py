"""Graphs of a generating model: exported, held against torch, and their tokens against transformers' own generate()."""

import contextlib

import numpy as np
import torch
import transformers
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from core.export import trace_onnx
from core.files import replace_when_done
from core.generation import Wish, generate, in_process
from core.onnx_runtime import open_session
from core.tables import LOGITS
from tasks.generation_graphs import BEYOND, graphs_of

CHECK_TOKENS, CHECK_TEXTS = 24, 4  # of the check against generate()
# (batch, new tokens or length of the source, past): a past of 0 is the prompt
CHECK_SHAPES = ((1, 1, 0), (1, 7, 0), (3, 5, 0), (2, 1, 9), (3, 4, 6), (8, 12, 0), (1, 1, 33))


def save_graphs(args, model, tokenizer, card, texts, paths):
    """Export and check every graph, and move them into place together, or none. Returns the worst relative error.

    paths: {graph: path}. A graph of an older export must not be taken for one that failed the check: it is removed.
    """
    graphs = graphs_of(model)
    with contextlib.ExitStack() as stack:
        temporary = {name: stack.enter_context(replace_when_done(paths[name])) for name in graphs}
        for name, module in graphs.items():
            trace_graph(module, card, temporary[name])
        sessions = {name: open_session(path) for name, path in temporary.items()}
        try:
            error = check_graphs(graphs, sessions, card, args.max_error)
            compared = check_tokens(model, tokenizer, card, sessions, texts)
        except SystemExit:
            for path in paths.values():
                path.unlink(missing_ok=True)
            raise
    print(f"ONNX Runtime agrees with torch: max error {error:.2g} of the largest value, past lengths 0 to 33")
    print(f"and with generate(): {compared} of {compared} tokens equal, {CHECK_TEXTS} texts of unequal length")
    return error


def trace_graph(module, card, path):
    """Module -> ONNX with batch and lengths dynamic; exits where the exporter cannot take the architecture."""
    axes = tuple({axis: torch.export.Dim.DYNAMIC for axis in numbers} for numbers in module.axes)
    try:
        sample = module.sample(card["generation"]["cache"])
        trace_onnx(module, sample, axes, list(module.inputs), list(module.outputs), path)
    except Exception as error:  # torch, onnxscript and the model each raise their own
        raise SystemExit(
            f"{card['name']}: expected {card['architecture']} to export with its cache, found: "
            f"{str(error).strip().splitlines()[0][:300]}; {BEYOND}"
        ) from None


def sample_feeds(graphs, cache, vocabulary, batch, length, past):
    """{graph: its inputs as torch tensors} with seeded tokens and one padded row; the past is a real one."""
    generator = torch.Generator().manual_seed(batch * 1000 + length * 10 + past)
    draw = lambda *shape: torch.randint(3, vocabulary, shape, generator=generator)  # noqa: E731
    decoder, feeds, ids = graphs["decoder"], {}, draw(batch, past + length)
    empty = lambda packed: packed[:, :, :, :0]  # noqa: E731
    if "encoder" in graphs:
        mask = torch.ones(batch, length + past, dtype=torch.int64)
        mask[0, max(1, length + past - 3) :] = 0
        feeds["encoder"] = (ids, mask)
        cross = graphs["encoder"](ids, mask)
        before = decoder(draw(batch, past), mask, empty(cross), cross)[1] if past else empty(cross)
        feeds["decoder"] = (draw(batch, 1), mask, before, cross)
        return feeds
    mask = torch.ones(batch, past + length, dtype=torch.int64)
    mask[0, : min(3, past + length - 1)] = 0
    layers, heads, size = cache
    before = torch.zeros(batch, layers, heads, 0, size)
    before = decoder(ids[:, :past], mask[:, :past], before)[1] if past else before
    return {"decoder": (ids[:, past:], mask, before)}


@torch.inference_mode()
def check_graphs(graphs, sessions, card, max_error):
    """ONNX Runtime against torch over CHECK_SHAPES. Returns the worst error, a share of the largest value."""
    worst, vocabulary = 0.0, card["outputs"][LOGITS][0]
    for shape in CHECK_SHAPES:
        for name, tensors in sample_feeds(graphs, card["generation"]["cache"], vocabulary, *shape).items():
            expected = graphs[name](*tensors)
            expected = [expected] if isinstance(expected, torch.Tensor) else expected
            feeds = dict(zip(graphs[name].inputs, (t.numpy() for t in tensors), strict=True))
            for output, found in zip(expected, sessions[name].run(None, feeds), strict=True):
                error = relative_error(output.numpy(), found)
                if not error <= max_error:  # NaN must not pass
                    raise SystemExit(
                        f"{name}: expected at most {max_error:g} of the largest value as error to torch at batch, new "
                        f"and past {shape}, found {error:g}; no graph was left; try another torch or onnxruntime version"
                    )
                worst = max(worst, error)
    return worst


def relative_error(expected, found):
    """Largest deviation as a share of the largest value, or of 1 where that is larger; infinite for another shape."""
    if expected.shape != found.shape:
        return float("inf")
    return float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))


# --- against generate() --------------------------------------------------------------


def check_tokens(model, tokenizer, card, sessions, texts):
    """Exit unless the loop's greedy tokens are generate()'s, text by text, all in one batch. Returns how many."""
    ordered = sorted(texts, key=len)
    chosen = [ordered[i * (len(ordered) - 1) // (CHECK_TEXTS - 1)] for i in range(CHECK_TEXTS)]
    encoded = (tokenizer(text, verbose=False)["input_ids"] for text in chosen)  # what is too long is cut here
    prompts = [ids[: card["max_length"]] or [card["generation"]["pad"]] for ids in encoded]
    count = min(CHECK_TOKENS, card["max_new_tokens"])
    found = [[] for _ in prompts]
    for row, token, _ in generate(in_process(sessions), card["generation"], prompts, [Wish(count)] * len(prompts)):
        found[row].append(token)
    for text, ours, theirs in zip(chosen, found, greedy_tokens(model, card, prompts, count), strict=True):
        if ours != theirs:
            raise SystemExit(
                f"{card['name']}: expected the tokens of generate() for {text[:40]!r}, {theirs}; found {ours}; "
                "no graph was left; report it with the model's name"
            )
    return sum(map(len, found))


@torch.inference_mode()
def greedy_tokens(model, card, prompts, count):
    """New tokens of transformers' generate() for each prompt, up to and with the first that ends it."""
    settings, size = card["generation"], max(map(len, prompts))
    both = settings["start"] is not None
    ids = torch.full((len(prompts), size), settings["pad"])
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(0, len(prompt)) if both else slice(size - len(prompt), size)
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=settings["ends"] or None,
        pad_token_id=settings["pad"],
        decoder_start_token_id=settings["start"],
        forced_bos_token_id=settings["first"],
        suppress_tokens=settings["suppressed"] or None,
    )
    # its own cache has as many layers as the encoder, although a T5 decoder may have more
    cache = {"past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache())} if both else {}
    rows = model.generate(input_ids=ids, attention_mask=mask, **cache)[:, 1 if both else size :].tolist()
    stops = [next((i + 1 for i, token in enumerate(row) if token in settings["ends"]), count) for row in rows]
    return [row[:stop] for row, stop in zip(rows, stops, strict=True)]
