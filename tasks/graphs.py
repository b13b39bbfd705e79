"""What of a model's output becomes the output of a task's graph."""

import torch

from core.tables import HIDDEN_STATE


class Graph(torch.nn.Module):
    """A model that takes its tensors by position and returns what its task asks for.

    members, starts: None, or where texts are packed (tasks/packing.py) which tokens are those of each text, bool
    [1, texts, tokens], and each text's first token, int64 [texts].
    """

    def __init__(self, model, inputs, kind, card):
        super().__init__()
        self.model, self.names = model, [name.lower() for name in inputs]
        self.members = self.starts = None
        self.take = GRAPHS[kind](self, card)

    def forward(self, *tensors):
        """int64 [batch, length] each -> the task's output, or a tuple with the hidden state behind it."""
        feeds = dict(zip(self.names, tensors, strict=True))
        return self.take(self.model(**feeds), feeds)

    def gather(self, hidden, chosen):
        """Sum over the chosen tokens, bool or int [batch, tokens], of each text: [batch, 1 or packed texts, hidden]."""
        chosen = chosen.unsqueeze(1) if self.members is None else self.members & (chosen.unsqueeze(1) > 0)
        return chosen.to(hidden.dtype) @ hidden


def logits(graph, card):
    """float32 [batch, classes], or [batch, length, classes] of a token classifier."""
    return lambda output, feeds: output.logits


def span_logits(graph, card):
    """float32 [batch, length, 2]: how likely an answer starts, and ends, at each token."""
    return lambda output, feeds: torch.stack((output.start_logits, output.end_logits), dim=-1)


def masked_logits(graph, card):
    """float32 [batch, vocabulary] at the mask token: the head sees that one token of a text, not all.

    A text without a mask token gives a row of no meaning, one with several the sum of theirs; both are refused when
    the answer is made.
    """

    def keep_masked(module, args, kwargs, output):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        output.last_hidden_state = graph.gather(output.last_hidden_state, ids == card["mask_id"])
        return output

    graph.model.base_model.register_forward_hook(keep_masked, with_kwargs=True)
    return lambda output, feeds: output.logits.squeeze(1 if graph.members is None else 0)


def pooled(graph, card):
    """float32 [batch, hidden] of length 1: the mean over real tokens, or the first token."""

    def take(output, feeds):
        hidden = output.last_hidden_state
        if card["pooling"] == "cls":
            vector = hidden[:, 0] if graph.starts is None else hidden[0, graph.starts]
        else:
            real = feeds["attention_mask"] if graph.members is None else torch.ones_like(feeds["input_ids"])
            counts = graph.gather(torch.ones_like(hidden[..., :1]), real).clamp(min=1)
            vector = (graph.gather(hidden, real) / counts).squeeze(1 if graph.members is None else 0)
        vector = torch.nn.functional.normalize(vector, dim=-1)
        return (vector, hidden) if HIDDEN_STATE in card["outputs"] else vector

    return take


GRAPHS = {function.__name__: function for function in (logits, span_logits, masked_logits, pooled)}
