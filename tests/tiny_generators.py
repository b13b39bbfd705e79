"""Tiny generating checkpoints with seeded weights, a tokenizer whose tokens are words, and exports made once for all tests."""

from conftest import succeed

TASKS = {"llama": "text-generation", "t5": "text2text-generation"}  # of the exports
MAX_LENGTH, MAX_NEW_TOKENS = 40, 1500
WORDS = [f"word{i}" for i in range(280)]
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|end|>")
TEXTS = ["word1", " ".join(WORDS[5:14]), " ".join(WORDS[40:43]), " ".join(WORDS[90:120]), " ".join(WORDS[7:200:12])]
TEMPLATE = (
    "{% for message in messages %}{{ '<|user|>' if message.role == 'user' else '<s>' }} {{ message.content }} <|end|> "
    "{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
)
SIZE = len(WORDS) + len(SPECIAL)
CAUSAL = {
    "vocab_size": SIZE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048,
}  # fmt: skip
CROSS = {
    "vocab_size": SIZE, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 192,
    "decoder_start_token_id": 2, "forced_eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
T5 = {
    "vocab_size": SIZE, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
KINDS = {  # name -> (class of its config, sizes)
    "gpt2": ("GPT2Config", {"vocab_size": SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "llama": ("LlamaConfig", CAUSAL | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", CAUSAL),
    "t5": ("T5Config", T5),
    "t5 with a deeper decoder": ("T5Config", T5 | {"num_decoder_layers": 3}),
    "bart": ("BartConfig", CROSS),
    "marian": ("MarianConfig", CROSS | {"decoder_vocab_size": SIZE}),
}


def make_tokenizer(chat_template=None):
    """Words and special tokens; </s> ends a text where there is no chat template."""
    import tokenizers
    import transformers

    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *WORDS))}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(list(SPECIAL))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=40,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def make_model(kind, seed=0):
    """A model of KINDS whose weights have such a size that greedy tokens vary."""
    import torch
    import transformers

    name, sizes = KINDS[kind]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").eval()
    scale = 0.7 if kind in ("bart", "marian") else 1.4
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=scale * parameter.shape[-1] ** -0.5)
    return model


def save_generator(folder, kind, chat_template=None, seed=0):
    """A checkpoint of KINDS in a folder."""
    make_model(kind, seed).save_pretrained(folder)
    make_tokenizer(chat_template).save_pretrained(folder)
    return folder


def make(folder):
    """Both tasks' checkpoints and their exports by the script, with what it printed."""
    texts = folder / "texts.txt"
    texts.write_text("\n".join([*TEXTS, *TEXTS[:4], "word1 " * 60]))  # the last is longer than a prompt may be
    for kind, task in TASKS.items():
        checkpoint = save_generator(folder / f"{kind}-checkpoint", kind, TEMPLATE if kind == "llama" else None)
        options = ("--texts", texts, "--max-length", MAX_LENGTH, "--max-new-tokens", MAX_NEW_TOKENS)
        done = succeed("torch2onnx.py", "--task", task, "--model", checkpoint, "--repository", folder / kind, *options)
        (folder / f"{kind}.printed").write_text(done.stdout + done.stderr)
