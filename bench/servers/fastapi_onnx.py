"""FastAPI in front of ONNX Runtime, batched by hand: whatever waits while a batch is computed is the next batch."""

import argparse
import asyncio
import contextlib
import json
import os
from pathlib import Path

import numpy as np
import onnxruntime
import tokenizers
import uvicorn
from fastapi import Body, FastAPI

BATCH = 32
NAMES = {"INPUT_IDS": "ids", "ATTENTION_MASK": "attention_mask", "TOKEN_TYPE_IDS": "type_ids"}


def open_classifier(args):
    """A function texts -> [(label, score)]."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(args.graph, options, providers=["CPUExecutionProvider"])
    labels = json.loads((args.model / "config.json").read_text(encoding="utf-8"))["id2label"]
    words = tokenizers.Tokenizer.from_file(args.tokenizer)
    inputs = [given.name for given in session.get_inputs()]
    # of the longest text of a batch: a fixed length, where tokenizer.json has one, is not what a service pays for
    words.enable_padding(pad_id=(words.padding or {}).get("pad_id", 0))

    def classify(texts):
        encoded = words.encode_batch(texts)
        feeds = {name: np.array([getattr(e, NAMES[name]) for e in encoded], dtype=np.int64) for name in inputs}
        logits = session.run(["LOGITS"], feeds)[0]
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        return [(labels[str(row.argmax())], float(row.max())) for row in shares]

    return classify


async def answer_batches(queue, classify):
    """Take what waits, compute it in a thread, hand the answers back; for ever."""
    while True:
        waiting = [await queue.get()]
        while len(waiting) < BATCH and not queue.empty():
            waiting.append(queue.get_nowait())
        try:
            answers = await asyncio.to_thread(classify, [text for text, _ in waiting])
            for (_, future), answer in zip(waiting, answers, strict=True):
                future.set_result(answer)
        except Exception as error:  # the next batch must not suffer for this one
            for _, future in waiting:
                future.set_exception(error)


def make_app(classify):
    queue = asyncio.Queue()

    @contextlib.asynccontextmanager
    async def lifespan(_):
        batcher = asyncio.create_task(answer_batches(queue, classify))
        yield
        batcher.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post("/classify")
    async def answer(text: str = Body(embed=True)):
        future = asyncio.get_running_loop().create_future()
        queue.put_nowait((text, future))
        label, score = await future
        return {"label": label, "score": score}

    return app


def main():
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint, for its labels")
    parser.add_argument("--graph", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    uvicorn.run(make_app(open_classifier(args)), host="127.0.0.1", port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
