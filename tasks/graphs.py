"""What of a model's output becomes the output of a task's graph."""

import torch

from core.tables import HIDDEN_STATE


class Graph(torch.nn.Module):
    """A model that takes its tensors by position and returns what its task asks for."""

    def __init__(self, model, inputs, take):
        super().__init__()
        self.model, self.take, self.names = model, take, [name.lower() for name in inputs]

    def forward(self, *tensors):
        """int64 [batch, length] each -> the task's output, or a tuple with the hidden state behind it."""
        feeds = dict(zip(self.names, tensors, strict=True))
        return self.take(self.model(**feeds), feeds)


def logits(model, card):
    """float32 [batch, classes], or [batch, length, classes] of a token classifier."""
    return lambda output, feeds: output.logits


def span_logits(model, card):
    """float32 [batch, length, 2]: how likely an answer starts, and ends, at each token."""
    return lambda output, feeds: torch.stack((output.start_logits, output.end_logits), dim=-1)


def masked_logits(model, card):
    """float32 [batch, vocabulary] at the mask token: the head sees that one token of a text, not all.

    A text without a mask token gives a row of no meaning, one with several the sum of theirs; both are refused when
    the answer is made.
    """
    mask_id = card["mask_id"]

    def keep_masked(module, args, kwargs, output):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        masked = (ids == mask_id).unsqueeze(-1).to(output.last_hidden_state.dtype)
        output.last_hidden_state = (output.last_hidden_state * masked).sum(1, keepdim=True)
        return output

    model.base_model.register_forward_hook(keep_masked, with_kwargs=True)
    return lambda output, feeds: output.logits.squeeze(1)


def pooled(model, card):
    """float32 [batch, hidden] of length 1: the mean over real tokens, or the first token."""

    def take(output, feeds):
        hidden = output.last_hidden_state
        mask = feeds["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        mean = card["pooling"] == "mean"
        vector = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1) if mean else hidden[:, 0]
        vector = torch.nn.functional.normalize(vector, dim=-1)
        return (vector, hidden) if HIDDEN_STATE in card["outputs"] else vector

    return take


GRAPHS = {function.__name__: function for function in (logits, span_logits, masked_logits, pooled)}
