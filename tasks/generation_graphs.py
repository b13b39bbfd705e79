"""Generating models as modules of flat tensors, with their cache as one tensor, and what they export to.

One decoder serves the prompt, with a past of length 0, and every further token. An encoder's work ends in the keys and
values of the cross attention, so that no step computes them again.
"""

import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from core.tables import ATTENTION_MASK, CROSS, INPUT_IDS, LOGITS, PAST, PRESENT

BEYOND = "such a model is for the vLLM or TensorRT-LLM backend of Triton"  # what a message recommends
# the exporter takes 0 and 1 for constants: none of these may be one
TRACED_BATCH, TRACED_TOKENS, TRACED_PAST, TRACED_SOURCE = 2, 3, 5, 7


def unpack(packed):
    """[batch, 2 × layers, heads, length, head size] -> DynamicCache."""
    return DynamicCache([(packed[:, i], packed[:, i + 1]) for i in range(0, packed.shape[1], 2)])


def pack(cache):
    """DynamicCache -> [batch, 2 × layers, heads, length, head size]: keys and values of each layer in turn."""
    return torch.stack([values for layer in cache.layers for values in (layer.keys, layer.values)], dim=1)


class CausalDecoder(torch.nn.Module):
    """A causal language model, one step."""

    inputs = (INPUT_IDS, ATTENTION_MASK, PAST)
    outputs = (LOGITS, PRESENT)

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, past):
        """int64 [batch, new], int64 [batch, past + new], cache -> float32 [batch, vocabulary] of the last, cache."""
        # positions count what the mask shows, so padding on the left needs no further input
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, past.shape[3] :]
        cache = unpack(past)
        logits = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1], pack(cache)

    def sample(self, cache):
        """Inputs that the exporter traces; cache: [2 × layers, heads, head size]."""
        layers, heads, size = cache
        ids = torch.full((TRACED_BATCH, TRACED_TOKENS), 5)
        mask = torch.ones(TRACED_BATCH, TRACED_PAST + TRACED_TOKENS, dtype=torch.int64)
        return ids, mask, torch.zeros(TRACED_BATCH, layers, heads, TRACED_PAST, size)

    axes = ({0: "batch", 1: "new"}, {0: "batch", 1: "all"}, {0: "batch", 3: "past"})


class Encoder(torch.nn.Module):
    """The encoder, and the cross attention's keys and values of every layer of the decoder."""

    inputs = (INPUT_IDS, ATTENTION_MASK)
    outputs = (CROSS,)

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        """int64 [batch, source] each -> [batch, 2 × layers, heads, source, head size]."""
        hidden = self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        # one token through the decoder fills the cache, in every architecture; the exporter drops the rest
        self.model(
            encoder_outputs=BaseModelOutput(hidden),
            attention_mask=attention_mask,
            decoder_input_ids=input_ids[:, :1],
            past_key_values=cache,
            use_cache=True,
        )
        return pack(cache.cross_attention_cache)

    def sample(self, cache):
        """Inputs that the exporter traces."""
        ids = torch.full((TRACED_BATCH, TRACED_SOURCE), 5)
        return ids, torch.ones_like(ids)

    axes = ({0: "batch", 1: "source"}, {0: "batch", 1: "source"})


class CrossDecoder(torch.nn.Module):
    """The decoder of an encoder-decoder, one step."""

    inputs = (INPUT_IDS, ATTENTION_MASK, PAST, CROSS)
    outputs = (LOGITS, PRESENT)

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, past, cross):
        """int64 [batch, new], int64 [batch, source], caches -> float32 [batch, vocabulary] of the last, cache."""
        cache = EncoderDecoderCache(unpack(past), unpack(cross))
        # else the decoder would compute its cross attention's keys anew
        cache.is_updated = dict.fromkeys(range(past.shape[1] // 2), True)
        # only its shape is looked at
        hidden = cross[:, 0, 0, :, :1].expand(-1, -1, self.model.config.hidden_size)
        logits = self.model(
            encoder_outputs=BaseModelOutput(hidden),
            attention_mask=attention_mask,
            decoder_input_ids=input_ids,
            past_key_values=cache,
            use_cache=True,
        ).logits
        return logits[:, -1], pack(cache.self_attention_cache)

    def sample(self, cache):
        """Inputs that the exporter traces; cache: [2 × layers, heads, head size]."""
        layers, heads, size = cache
        ids = torch.full((TRACED_BATCH, TRACED_TOKENS), 5)
        mask = torch.ones(TRACED_BATCH, TRACED_SOURCE, dtype=torch.int64)
        past, cross = (torch.zeros(TRACED_BATCH, layers, heads, n, size) for n in (TRACED_PAST, TRACED_SOURCE))
        return ids, mask, past, cross

    axes = ({0: "batch", 1: "new"}, {0: "batch", 1: "source"}, {0: "batch", 3: "past"}, {0: "batch", 3: "source"})


def graphs_of(model):
    """{"encoder", "decoder": module} of a model, without the encoder where it has none."""
    if model.config.is_encoder_decoder:
        return {"encoder": Encoder(model).eval(), "decoder": CrossDecoder(model).eval()}
    return {"decoder": CausalDecoder(model).eval()}


def cache_dims(model):
    """[2 × layers, heads, head size] of a model's cache, as a run of one token leaves it."""
    ids = torch.full((1, 2), 5)
    with torch.inference_mode():
        if model.config.is_encoder_decoder:
            packed = Encoder(model)(ids, torch.ones_like(ids))
        else:
            packed = pack(model(input_ids=ids, use_cache=True).past_key_values)
    _, layers, heads, _, size = packed.shape
    return [layers, heads, size]
