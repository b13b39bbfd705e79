"""BentoML with a checkpoint in torch: one worker and its adaptive batching."""

import os

import bentoml
from torch_classifier import open_classifier

BATCH, LATENCY_MS = 32, 1000


@bentoml.service(workers=1, traffic={"timeout": 120, "max_concurrency": 4 * BATCH})
class Classifier:
    def __init__(self):
        self.model = open_classifier(os.environ["CHECKPOINT"], int(os.environ["OMP_NUM_THREADS"]))

    @bentoml.api(batchable=True, max_batch_size=BATCH, max_latency_ms=LATENCY_MS)
    def classify(self, texts: list[str]) -> list[dict]:
        return self.model(texts)
