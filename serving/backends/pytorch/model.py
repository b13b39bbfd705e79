"""Python-based Triton backend: executes a TorchScript, or a package of AOTInductor (.pt2), with torch on the CPU.

Serves `platform: "pytorch_libtorch"` where Triton has no compiled PyTorch backend. Tensors are INPUT__0, INPUT__1, … and
OUTPUT__0, … in the order of the script's own; of a package ARGS[0], … and RESULT. Understands the compiled backend's
parameters INTRA_OP_THREAD_COUNT and DISABLE_OPTIMIZED_EXECUTION.
"""

import os
import re
import sys
import zipfile
from pathlib import Path

# serve.sh puts graph_model.py beside this file: the server may have been started anywhere
sys.path.insert(0, str(Path(__file__).parent))

from graph_model import GraphModel


class TritonPythonModel(GraphModel):
    title, file, outside = "PyTorch", "model.pt", "index out of range"

    def open(self, path, config, settings):
        # threads that spin between two operators take the cores from the server; OpenMP reads it as torch is loaded
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        import torch

        if threads := int(settings.get("INTRA_OP_THREAD_COUNT", 0)):
            torch.set_num_threads(threads)
        script = load_package(path) if path.suffix == ".pt2" else torch.jit.load(path, map_location="cpu").eval()
        order = sorted(self.inputs, key=number_of)
        outputs = list(map(number_of, self.outputs))
        optimized = settings.get("DISABLE_OPTIMIZED_EXECUTION", "false").lower() != "true"

        def compute(feeds):
            with torch.inference_mode(), torch.jit.optimized_execution(optimized):
                found = script(*(torch.from_numpy(feeds[name]) for name in order))
            found = [found] if isinstance(found, torch.Tensor) else list(found)
            if len(found) <= max(outputs):
                raise ValueError(f"expected {max(outputs) + 1} outputs of the script, found {len(found)}")
            return [found[number].numpy() for number in outputs]

        return compute


def load_package(path):
    """A function that executes a package of AOTInductor; a file that is none, and a failed run, are told in one line."""
    import torch

    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        raise ValueError("a file that is cut short, or no package of AOTInductor") from None
    if not any("data/aotinductor/" in name for name in names):
        raise ValueError("an archive without code that AOTInductor compiled")
    package = torch._inductor.aoti_load_package(str(path))

    def run(*tensors):
        try:
            return package(*tensors)
        except RuntimeError as error:  # a stack of C++ calls follows
            raise ValueError(str(error).splitlines()[0]) from None

    return run


def number_of(name):
    """Which of a script's tensors a name means; raises ValueError for a name that does not say it."""
    found = re.fullmatch(r"(?:INPUT__|OUTPUT__|ARGS\[|RESULT\[)(\d+)\]?", name)
    if not found and name != "RESULT":
        raise ValueError(f"tensor {name}, where the names are INPUT__0, OUTPUT__0, ARGS[0], RESULT and so on")
    return int(found[1]) if found else 0
