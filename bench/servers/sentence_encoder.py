"""sentence-transformers without a server: encodes the same texts once for each line that it reads.

Prints "ready", then "seconds N" for each line; the first embeddings are written to --embeddings as .npy.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

BATCH = 32
# by default OpenVINO multiplies in BF16 where the processor can
FP32 = {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of the encoder")
    parser.add_argument("--backend", choices=("torch", "onnx", "openvino", "openvino-f32"), required=True)
    parser.add_argument("--texts", type=Path, required=True, help="JSON list")
    parser.add_argument("--embeddings", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    backend, _, exact = args.backend.partition("-")
    model = SentenceTransformer(args.model, backend=backend, device="cpu", model_kwargs=FP32 if exact else {})
    texts = json.loads(args.texts.read_text(encoding="utf-8"))
    # normalized or not as the model's own modules have it
    np.save(args.embeddings, model.encode(texts, batch_size=BATCH))
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        model.encode(texts, batch_size=BATCH)
        print("seconds", time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
