"""The task's own head: a text encoder and a linear layer on every token of its last hidden state."""

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
)

from core.checkpoint import find_limit, input_names, load_config, load_pretrained, load_tokenizer, packaged_folder
from core.sources import find_folders
from core.tables import EMBEDDING, MAX_LENGTH


class Embedder(torch.nn.Module):
    """A text encoder and a fully connected layer on every token of its last hidden state."""

    def __init__(self, transformer, num_outputs, seed):
        super().__init__()
        self.transformer = transformer
        torch.manual_seed(seed)  # the head is not trained: the same seed gives the same file
        self.linear = torch.nn.Linear(transformer.config.hidden_size, num_outputs)

    def forward(self, *tensors):
        """INPUT_IDS, ATTENTION_MASK, int64 [batch, length] each -> float32 [batch, length, num_outputs]."""
        input_ids, attention_mask = tensors
        hidden = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.linear(hidden)


def encoder_class(config, folder):
    """Class of transformers that loads the encoder; exits for decoders, and for both in one but T5's encoder."""
    if config.is_encoder_decoder and config.model_type in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES:
        return transformers.AutoModelForTextEncoding  # T5EncoderModel
    encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if not encoder or config.is_encoder_decoder or getattr(config, "is_decoder", False):
        raise SystemExit(
            f"{folder}/config.json: expected an encoder such as BERT, found model_type {config.model_type}, "
            "a decoder or encoder-decoder; name the checkpoint of an encoder"
        )
    return transformers.AutoModel


def load_encoder(folder, random_weights, seed):
    """The encoder alone: its pooler does not reach the last hidden state, and no graph holds it."""
    config = load_config(folder)
    auto_model = encoder_class(config, folder)
    if random_weights:
        torch.manual_seed(seed)
        encoder = auto_model.from_config(config, attn_implementation="eager").eval()
    else:
        encoder = load_pretrained(auto_model, folder, config, unused=("pooler",))
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    return encoder


def load(args):
    """--model -> (Embedder, tokenizer, what the record says of it)."""
    folder, tokenizer_folder, card = find_folders(args)
    max_length = args.max_length or MAX_LENGTH
    fixed = not getattr(args, "dynamic_length", False)
    # DistilBERT's architecture without a checkpoint: its vocabulary is MiniLM's
    tokenizer = load_tokenizer(tokenizer_folder or packaged_folder(), max_length)
    encoder = load_encoder(folder, args.random_weights, args.seed)
    embedder = Embedder(encoder, args.num_outputs, args.seed).eval()
    inputs = input_names(encoder, tokenizer, token_types=False)
    find_limit(embedder, inputs, encoder.config, tokenizer, max_length)
    card |= {
        "weights": f"random, seed {args.seed}" if args.random_weights else "real",
        "architecture": type(encoder).__name__,
        "inputs": inputs,
        "outputs": {EMBEDDING: [max_length if fixed else -1, args.num_outputs]},
        "max_length": max_length,
        "fixed_length": fixed,
        "num_outputs": args.num_outputs,
        "seed": args.seed,
    }
    return embedder, tokenizer, card
