"""Make a small SavedModel with seeded weights, and answer some inputs with TensorFlow itself.

Run by build.py, in the environment that has TensorFlow: make_model.py model.savedmodel expected.json
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}

import tensorflow as tf

FEATURES, HIDDEN, CLASSES, ROWS = 4, 8, 3, 8


class Classifier(tf.Module):
    """Two layers and a softmax."""

    def __init__(self, random):
        self.hidden = tf.Variable(random.normal([FEATURES, HIDDEN]))
        self.output = tf.Variable(random.normal([HIDDEN, CLASSES]))

    @tf.function(input_signature=[tf.TensorSpec([None, FEATURES], tf.float32, name="features")])
    def classify(self, features):
        return {"probabilities": tf.nn.softmax(tf.nn.relu(features @ self.hidden) @ self.output)}


def main():
    saved_model, expected = map(Path, sys.argv[1:])
    random = tf.random.Generator.from_seed(0)
    model = Classifier(random)
    tf.saved_model.save(model, str(saved_model), signatures={"serving_default": model.classify})
    features = random.normal([ROWS, FEATURES])
    answers = model.classify(features)["probabilities"]
    expected.write_text(json.dumps({"features": features.numpy().tolist(), "probabilities": answers.numpy().tolist()}))


if __name__ == "__main__":
    main()
