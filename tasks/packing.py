"""The same model on texts that lie one behind the other in a single row, without padding."""

import numpy as np
import torch

from core.export import export_packed
from core.files import replace_when_done, sha256
from core.onnx_runtime import open_session
from core.runner import pack, packed_inputs
from core.tables import HIDDEN_STATE
from tasks.table import TASKS

SAME = 1e-4  # largest difference to what a text gives alone


class PackedGraph(torch.nn.Module):
    """A task's Graph on INPUT_IDS, perhaps TOKEN_TYPE_IDS, POSITIONS, SEGMENTS [tokens] and STARTS [texts].

    SEGMENTS numbers the text of each token, and tokens see only those of their own text. The output is
    [tokens, …] where the task has a row per token, else [texts, …].
    """

    def __init__(self, graph, task, inputs):
        super().__init__()
        self.padded, self.per_token, self.names = graph, task.per_token, [n.lower() for n in packed_inputs(inputs)]
        if task.graph == "logits" and not task.per_token:
            base = graph.model.base_model
            encoder = getattr(base, "encoder", None) or getattr(base, "transformer", None) or base
            encoder.register_forward_hook(self.keep_first)

    def keep_first(self, module, args, output):
        """A pooler or head that takes the first token of each row finds that of each text."""
        if self.padded.starts is not None:
            output.last_hidden_state = output.last_hidden_state[0, self.padded.starts].unsqueeze(1)
        return output

    def forward(self, *tensors):
        feeds = dict(zip(self.names, tensors, strict=True))
        segments, starts = feeds.pop("segments"), feeds.pop("starts")
        same = segments.unsqueeze(0) == segments.unsqueeze(1)
        mask = torch.where(same, 0.0, torch.finfo(torch.float32).min)
        row = {name: values.unsqueeze(0) for name, values in feeds.items()}
        row["position_ids"] = row.pop("positions")
        texts = torch.arange(starts.shape[0], device=segments.device).unsqueeze(1)
        graph = self.padded
        graph.starts, graph.members = starts, (segments.unsqueeze(0) == texts).unsqueeze(0)
        try:
            found = graph.take(graph.model(attention_mask=mask.unsqueeze(0).unsqueeze(0), **row), row)
            return found[0] if self.per_token else found
        finally:
            graph.starts = graph.members = None


def find_offset(packed, encodings, inputs, config):
    """What POSITIONS start with, so that packed texts give what each gives alone; None where no start does.

    encodings: of texts without padding, one of them longer than a window of local attention. Architectures with
    relative positions take no POSITIONS, some take no mask of such a form.
    """
    with torch.inference_mode():
        alone = [packed.padded(*alone_tensors(encoding, inputs)) for encoding in encodings]
        alone = torch.cat([a[0] if packed.per_token else a for a in alone])
        for offset in dict.fromkeys((0, (getattr(config, "pad_token_id", None) or 0) + 1)):
            feeds = pack(encodings, packed_inputs(inputs), offset)
            try:
                found = packed(*map(torch.from_numpy, feeds.values()))
            except (RuntimeError, TypeError, AttributeError, IndexError):
                continue
            if found.shape == alone.shape and np.allclose(found, alone, atol=SAME):
                return offset
    return None


def alone_tensors(encoding, inputs):
    """Tensors of one text without padding."""
    columns = {
        "INPUT_IDS": encoding.ids,
        "ATTENTION_MASK": [1] * len(encoding.ids),
        "TOKEN_TYPE_IDS": encoding.type_ids,
    }
    return [torch.tensor([columns[name]]) for name in inputs]


def write_packed(graph, tokenizer, card, examples, path, max_error):
    """Export the packed graph beside the padded one and check it; what the record says of it, None where there is none.

    tokenizer: as the server has it. examples: requests of unequal lengths, the longest last.
    """
    task, inputs = TASKS[card["task"]], card["inputs"]
    path.unlink(missing_ok=True)
    if card["fixed_length"] or HIDDEN_STATE in card["outputs"]:
        return None
    padding = tokenizer.padding
    tokenizer.no_padding()
    encodings = tokenizer.encode_batch(examples)
    tokenizer.enable_padding(**padding)
    packed = PackedGraph(graph, task, inputs).eval()
    offset = find_offset(packed, encodings[-3:], inputs, graph.model.config)
    if offset is None:
        return None
    with replace_when_done(path) as temporary:
        # lengths that differ from one another and from the number of texts
        export_packed(packed, pack(encodings[1:4], packed_inputs(inputs), offset), card, temporary)
        error = check_packed(packed, encodings, inputs, offset, temporary, task.output)
        if not error <= max_error:  # NaN must not pass
            raise SystemExit(
                f"{path}: expected at most {max_error:g} max abs error to torch, found {error:g}; leave packing out with "
                "--no-packed"
            )
    return {"position_offset": offset, "max_abs_error_to_torch": error, "sha256": sha256(path)}


def check_packed(packed, encodings, inputs, offset, path, output):
    """Largest error of the ONNX graph to each text alone in torch, packed few and many at a time."""
    session, worst = open_session(path), 0.0
    for start, stop in ((0, 1), (0, 3), (len(encodings) - 2, len(encodings)), (3, 12)):
        chunk = encodings[start:stop]
        with torch.inference_mode():
            alone = [packed.padded(*alone_tensors(encoding, inputs)) for encoding in chunk]
        expected = torch.cat([a[0] if packed.per_token else a for a in alone]).numpy()
        (found,) = session.run([output], pack(chunk, packed_inputs(inputs), offset))
        worst = max(worst, float(np.abs(found - expected).max()) if found.shape == expected.shape else float("inf"))
    return worst
