"""Python-based Triton backend: vLLM on the CPU, where Triton's own vLLM backend is not there.

Serves `backend: "vllm"`. Reads <model>/<version>/model.json, the arguments of vLLM's engine. Of the stock backend's inputs it
knows text_input, stream, sampling_parameters and exclude_input_in_output; sampling parameters may also be parameters of the
request. vLLM comes from the model's environment (EXECUTION_ENV_PATH).
"""

import asyncio
import json
import locale
import os
import threading
import uuid
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

# the stub starts in ASCII, the engine is of this machine alone, and keeps so many GiB of keys and values
locale.setlocale(locale.LC_ALL, "C.UTF-8")
os.environ |= {"VLLM_HOST_IP": "127.0.0.1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
HELP = "see examples/vllm/README.md"


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(auto_complete_model_config):
        """Leave the config as it is written: configs are complete."""
        return auto_complete_model_config

    def initialize(self, args):
        """Start the engine in an event loop of its own thread."""
        options = read_options(Path(args["model_repository"]) / args["model_version"] / "model.json")
        try:
            from vllm import SamplingParams
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise fault(f"expected vllm in the model's environment, found: {error}; {HELP}") from None
        self.loop, self.sampling = asyncio.new_event_loop(), SamplingParams
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

        async def start():
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**options))

        try:
            self.engine = asyncio.run_coroutine_threadsafe(start(), self.loop).result()
        except Exception as error:  # vLLM's errors share no base
            raise fault(f"{options['model']}: expected a model that vLLM starts, found: {error}") from None

    def execute(self, requests):
        """Hand each request to the engine, which batches in flight; answers go out when they are there."""
        for request in requests:
            asyncio.run_coroutine_threadsafe(self.answer(request, request.get_response_sender()), self.loop)

    async def answer(self, request, sender):
        """Send the pieces of a text as they come, or the whole of it."""
        number = uuid.uuid4().hex
        try:
            prompt, stream, repeat, sampling = self.read_request(request)
            sent = ""
            async for output in self.engine.generate(prompt, sampling, number):
                text = output.outputs[0].text
                if stream:
                    sender.send(response(text[len(sent) :]))
                    sent = text
                if request.is_cancelled():
                    await self.engine.abort(number)
                    break
            sender.send(**({"flags": FINAL} if stream else {"response": response(repeat + text), "flags": FINAL}))
        except Exception as error:  # a bad request, or the engine's own: this request fails alone
            sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error))), FINAL)

    def read_request(self, request):
        """(prompt, whether to stream, text before the answer, sampling parameters) as the stock backend reads them."""

        def value_of(name, default):
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            return default if tensor is None else tensor.as_numpy().ravel()[0]

        prompt = value_of("text_input", b"").decode()
        stream = bool(value_of("stream", False))
        repeat = not value_of("exclude_input_in_output", stream)
        if stream and repeat:
            raise ValueError("exclude_input_in_output: expected true where stream is, found false")
        given = json.loads(value_of("sampling_parameters", b"").decode() or request.parameters() or "{}")
        return prompt, stream, prompt if repeat else "", self.sampling(**given)

    def finalize(self):
        """End the engine's process."""
        self.engine.shutdown()


def response(text):
    return pb_utils.InferenceResponse([pb_utils.Tensor("text_output", np.array([text.encode()], dtype=object))])


def fault(words):
    """What initialize raises: Triton shows it as the reason why the model is not served."""
    return pb_utils.TritonModelException(words)


def read_options(path):
    """The engine's arguments; what is wrong with the file or the weights is said here, since vLLM says it in its log only."""
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
        model = Path(options["model"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise fault(f"{path}: expected the engine's arguments with a model, found {error!r}; {HELP}") from None
    weights = sorted(model.glob("*.safetensors"))
    if not (model / "config.json").is_file() or not weights:
        raise fault(f"{model}: expected a checkpoint, config.json and safetensors, found none; {HELP}")
    for file in weights:
        with open(file, "rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = opened.read(size) if size < file.stat().st_size else b""
        try:
            end = max(part["data_offsets"][1] for name, part in json.loads(header).items() if name != "__metadata__")
        except ValueError:
            end = None
        if end is None or file.stat().st_size != 8 + size + end:
            raise fault(f"{file}: expected whole weights in safetensors, found another file or a part of one; {HELP}")
    return options
