"""A service that generates text, as a Triton model: TEXT or MESSAGES -> GENERATED, TOKENS, FINISH_REASON.

It lies in a repository as <service>/1/model.py, beside generation.py and prompts.py, copies of the project's files,
and settings.json. The requests that wait are one batch, and a token is one run of a graph: of the models beside it in
the repository, or on a CPU, where the settings name graphs, in this process, so that no cache goes from one process to
another. An answer comes whole, or piece by piece with the parameter stream: the model is decoupled.
"""

import json
import sys
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

OUTPUTS = {"encoder": ["CROSS"], "decoder": ["LOGITS", "PRESENT"]}
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
BYTES = np.object_


class TritonPythonModel:
    def initialize(self, args):
        """Read settings, tokenizer and chat template once, and the graphs that are run here."""
        own = Path(args["model_repository"]).resolve()
        self.settings = json.loads((own / args["model_version"] / "settings.json").read_text(encoding="utf-8"))
        home = own / self.settings.get("home", "")  # another folder where graphs are run here
        sys.path.insert(0, str(home / "site-packages"))
        import generation  # beside this file, which only Triton has put on the path
        import prompts
        import texts
        from tokenizers import Tokenizer

        self.generation, self.prompts, self.texts = generation, prompts, texts
        self.limits = texts.read_limits(json.loads(args["model_config"]))
        self.tokenizer = Tokenizer.from_file(str(home / "tokenizer.json"))
        template = self.settings["chat_template"]
        self.template = prompts.compile_template(template) if template else None
        self.run = self.open_graphs(self.settings["graphs"]) if "graphs" in self.settings else self.ask

    def open_graphs(self, paths):
        """run(model, feeds) of the graphs in this process; paths: {model: path}."""
        import onnx_runtime  # beside this file too

        try:
            sessions = {model: onnx_runtime.open_session(path) for model, path in paths.items()}
        except Exception as error:  # ONNX Runtime's exceptions share no other base
            raise pb_utils.TritonModelException(
                f"{', '.join(paths.values())}: expected graphs that ONNX Runtime loads, found: {error}"
            ) from None
        return self.generation.in_process(sessions)

    def execute(self, requests):
        """Generate for all requests as one batch; a bad request fails alone."""
        calls = []
        for request in requests:
            sender = request.get_response_sender()
            try:
                calls.append(Call(self, request, sender))
            except ValueError as error:
                send_error(sender, str(error), pb_utils.TritonError.INVALID_ARG)
        try:
            self.generate([(call, row) for call in calls for row in range(len(call.prompts))])
        except Exception as error:  # of a graph: whoever still waits is told
            for call in calls:
                if not call.ended:
                    send_error(call.sender, f"generation: {error}", pb_utils.TritonError.INTERNAL)

    def generate(self, places):
        """Run the loop; places: (call, its row) of each row of the batch."""
        prompts, wishes = [c.prompts[row] for c, row in places], [c.wish for c, _ in places]
        gone = lambda row: places[row][0].is_gone(places[row][1])  # noqa: E731
        loop = self.generation.generate(self.run, self.settings, prompts, wishes, take_rows, gone) if places else ()
        for row, token, reason in loop:
            call, own_row = places[row]
            call.add(own_row, token, reason)

    def ask(self, model, feeds):
        """One run of a graph by its model; its cache stays a tensor of Triton's, which becomes the next run's PAST by its name."""
        tensors = [as_tensor(name, values) for name, values in feeds.items()]
        names, target = OUTPUTS[model], self.settings["models"][model]
        request = pb_utils.InferenceRequest(model_name=target, requested_output_names=names, inputs=tensors)
        response = request.exec()
        if response.has_error():
            raise RuntimeError(response.error().message())
        found = {tensor.name(): tensor for tensor in response.output_tensors()}
        return found | ({"LOGITS": found["LOGITS"].as_numpy()} if "LOGITS" in found else {})


class Call:
    """A request while it is answered."""

    def __init__(self, model, request, sender):
        """Read it; raises ValueError with what is wrong."""
        self.sender, self.outputs = sender, request.requested_output_names()
        self.decode = lambda ids: model.tokenizer.decode(ids, skip_special_tokens=True)
        parameters = json.loads(request.parameters() or "{}")
        wish = model.prompts.read_parameters(parameters, model.settings["max_new_tokens"])
        self.stream = wish.pop("stream")
        self.wish, self.next_piece = model.generation.Wish(**wish), model.prompts.next_piece
        self.prompts = [self.read_prompt(model, name, text) for name, text in read_texts(model, request)]
        if self.stream and len(self.prompts) > 1:
            raise ValueError(f"stream: expected one text in the request, found {len(self.prompts)}")
        self.tokens, self.reasons = [[] for _ in self.prompts], [None for _ in self.prompts]
        self.ended, self.length, self.sent = False, 0, 0

    def read_prompt(self, model, name, text):
        """Token ids of a text or of a chat."""
        if name == "TEXT":
            return model.prompts.encode_prompt(model.tokenizer, text, name, model.settings["max_length"])
        if model.template is None:
            raise ValueError("MESSAGES: expected a model with a chat template, found none; send TEXT")
        messages = model.prompts.read_messages(text)
        text = model.prompts.render_chat(model.template, messages, model.settings["special_tokens"])
        return model.prompts.encode_prompt(model.tokenizer, text, name, model.settings["max_length"], special=False)

    def add(self, row, token, reason):
        """One more token; answers where it is time to."""
        self.tokens[row].append(token)
        self.reasons[row] = reason
        self.ended = None not in self.reasons
        if self.stream:
            piece, self.length = self.next_piece(self.decode, self.tokens[0], self.length, self.ended)
            if piece or self.ended:
                self.send([piece], [len(self.tokens[0]) - self.sent])
                self.sent = len(self.tokens[0])
        elif self.ended:
            self.send([self.decode(tokens) for tokens in self.tokens], [len(tokens) for tokens in self.tokens])

    def send(self, texts, counts):
        """A response with the outputs that are asked for; the last one says so."""
        columns = {
            "GENERATED": np.array([[text.encode()] for text in texts], dtype=BYTES),
            "TOKENS": np.array([[count] for count in counts], dtype=np.int64),
            "FINISH_REASON": np.array([[(reason or "").encode()] for reason in self.reasons], dtype=BYTES),
        }
        tensors = [pb_utils.Tensor(name, values) for name, values in columns.items() if name in self.outputs]
        self.sender.send(pb_utils.InferenceResponse(tensors), flags=FINAL if self.ended else 0)

    def is_gone(self, row):
        """Whether the client has left; the request ends then, without an answer."""
        # Triton is asked once a step, for the first row that goes on: the question goes to another process
        if not self.ended and row == self.reasons.index(None) and self.sender.is_cancelled():
            self.ended = True
            self.sender.send(flags=FINAL)
        return self.ended


def read_texts(model, request):
    """[(input, text)] of a request's rows, of the one input that it has."""
    tensors = {name: pb_utils.get_input_tensor_by_name(request, name) for name in ("TEXT", "MESSAGES")}
    tensors = {name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None}
    if len(tensors) != 1:
        raise ValueError(f"expected TEXT or MESSAGES in a request, found {' and '.join(tensors) or 'none of them'}")
    (name,) = tensors
    return [(name, text) for text in model.texts.read_texts(tensors, model.limits)]


def as_tensor(name, values):
    """An input of a graph: of an array, or of what another run returned, without a copy."""
    if isinstance(values, np.ndarray):
        return pb_utils.Tensor(name, values)
    return values if values.name() == name else pb_utils.Tensor.from_dlpack(name, values.to_dlpack())


def take_rows(tensor, rows):
    """Rows of a cache, as an array."""
    return (tensor if isinstance(tensor, np.ndarray) else tensor.as_numpy())[rows]


def send_error(sender, message, code):
    """The only response to a request that fails."""
    sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code)), flags=FINAL)
