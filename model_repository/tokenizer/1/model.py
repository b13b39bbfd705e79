"""Tokenizer as a Triton model: TEXT -> INPUT_IDS, ATTENTION_MASK and what else the config names.

QUESTION and CONTEXT are read as a pair. TOKEN_TYPE_IDS tells the two apart; SPANS has the first character of each token
and the one behind its last, WORDS the number of its word, -1 for padding and for the tokenizer's own tokens.

Reads assets/tokenizer/tokenizer.json, which torch2onnx.py writes with truncation and
padding in it, and the tokenizers package from assets/site-packages. Both are found beside
the model repository: /models and /assets in the container, model_repository/ and assets/ in a
checkout. A classifier's repository has both in the tokenizer's own folder.
"""

import json
import sys
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

# tensor -> field of an encoding
FIELDS = {"INPUT_IDS": "ids", "ATTENTION_MASK": "attention_mask", "TOKEN_TYPE_IDS": "type_ids", "SPANS": "offsets"}


class TritonPythonModel:
    def initialize(self, args):
        """Load the tokenizer once and hold it against the config's length."""
        own = Path(args["model_repository"]).resolve()
        assets = own.parent.parent / "assets"
        alone = (own / "tokenizer.json").is_file()
        sys.path.insert(0, str((own if alone else assets) / "site-packages"))
        import texts  # beside this file, which only Triton has put on the path
        from tokenizers import Tokenizer  # only now can it be found

        self.texts = texts
        path = (own if alone else assets / "tokenizer") / "tokenizer.json"
        self.tokenizer = Tokenizer.from_file(str(path))
        config = json.loads(args["model_config"])
        self.limits = texts.read_limits(config)
        dims = {output["name"]: output["dims"] for output in config["output"]}
        self.inputs, self.outputs = [tensor["name"] for tensor in config["input"]], list(dims)
        length = int(dims["INPUT_IDS"][0])
        if length == -1:  # as long as the longest text of a batch
            return
        found = (self.tokenizer.truncation or {}).get("max_length"), (self.tokenizer.padding or {}).get("length")
        if found != (length, length):
            raise pb_utils.TritonModelException(
                f"{path}: expected truncation and padding to {length} as in config.pbtxt, found {found}; run torch2onnx.py"
            )

    def execute(self, requests):
        """Tokenise the texts of all requests in one call; a bad request fails alone."""
        texts, spans, errors = [], [], {}
        for index, request in enumerate(requests):
            start = len(texts)
            try:
                columns = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
                texts += self.texts.read_texts(columns, self.limits)
            except ValueError as error:
                errors[index] = str(error)
            spans.append(slice(start, len(texts)))
        encodings = self.texts.encode(self.tokenizer, texts)
        tensors = {name: np.array([column(e, name) for e in encodings], dtype=np.int64) for name in self.outputs}
        return [
            failure(errors[index]) if index in errors else answer(tensors, span) for index, span in enumerate(spans)
        ]


def column(encoding, name):
    """One tensor's values of one text."""
    if name != "WORDS":
        return getattr(encoding, FIELDS[name])
    own = zip(encoding.word_ids, encoding.special_tokens_mask, strict=True)
    return [-1 if word is None or special else word for word, special in own]


def answer(tensors, span):
    """Response with a request's rows of each tensor, int64 [batch, length]."""
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, values[span]) for name, values in tensors.items()])


def failure(message):
    """Response that carries only an error."""
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))
