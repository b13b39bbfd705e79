"""Triton model that says which version of a package it runs with: the proof that its environment is its own."""

import importlib
import platform

import numpy as np
import triton_python_backend_utils as pb_utils


def version_of(package):
    """The version of an imported package, not that of a file beside it; "python" is the interpreter's."""
    if package == "python":
        return platform.python_version()
    return importlib.import_module(package).__version__


class TritonPythonModel:
    def execute(self, requests):
        """One version for each name; a package that is not there fails its request alone."""
        return [self.answer(pb_utils.get_input_tensor_by_name(request, "PACKAGE").as_numpy()) for request in requests]

    def answer(self, names):
        try:
            versions = [version_of(name.decode()) for name in names.ravel()]
        except (ImportError, AttributeError, ValueError) as error:
            return pb_utils.InferenceResponse(
                error=pb_utils.TritonError(f"PACKAGE: {error}", pb_utils.TritonError.INVALID_ARG)
            )
        found = np.array(versions, dtype=object).reshape(names.shape)
        return pb_utils.InferenceResponse([pb_utils.Tensor("VERSION", found)])
