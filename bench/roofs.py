"""The fastest matrix multiplications of this machine, by torch and by ONNX Runtime: the roofs of bench/limits.py."""

import os
import time

import numpy as np

from core.engines import has_bf16

ROOF_SIZES = (512, 1024, 2048)  # of square GEMMs, of which the fastest counts


def measure_roofs():
    """{precision: FLOP/s of the fastest GEMM on all cores, of torch's and ONNX Runtime's; None where there is none}."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    found = {"FP32": [], "BF16": [], "INT8": []}
    for n in ROOF_SIZES:
        a, b = (torch.rand(n, n) for _ in range(2))
        calls = {"FP32": [lambda: a @ b, float_matmul(n)]}  # noqa: B023
        if has_bf16():
            c, d = a.bfloat16(), b.bfloat16()
            calls["BF16"] = [lambda: c @ d]  # noqa: B023
        i, j = (torch.randint(-100, 100, (n, n), dtype=torch.int8) for _ in range(2))
        calls["INT8"] = [lambda: torch._int_mm(i, j), integer_matmul(n)]  # noqa: B023
        for precision, functions in calls.items():
            found[precision] += [2 * n**3 / least_seconds(function) for function in functions]
    return {precision: max(speeds, default=None) for precision, speeds in found.items()}


def integer_matmul(n):
    """A function that multiplies two matrices of 8 bits with ONNX Runtime."""
    rng = np.random.default_rng(0)
    weight = rng.integers(-64, 64, (n, n)).astype(np.int8)
    return session_matmul("MatMulInteger", rng.integers(0, 255, (n, n)).astype(np.uint8), weight, "INT32")


def float_matmul(n):
    """The same in FP32."""
    rng = np.random.default_rng(0)
    return session_matmul("MatMul", *(rng.random((n, n), dtype=np.float32) for _ in range(2)), "FLOAT")


def session_matmul(operator, given, weight, made):
    """A function that runs a graph of one operator, given [n, n] × weight [n, n], on all cores."""
    from onnx import TensorProto, helper, numpy_helper

    from core.onnx_runtime import open_session

    kind = helper.np_dtype_to_tensor_dtype(given.dtype)
    tensors = [
        helper.make_tensor_value_info(name, k, given.shape)
        for name, k in (("A", kind), ("Y", getattr(TensorProto, made)))
    ]
    node = helper.make_node(operator, ["A", "B"], ["Y"])
    graph = helper.make_graph([node], "g", tensors[:1], tensors[1:], [numpy_helper.from_array(weight, "B")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    session = open_session(model)
    return lambda: session.run(None, {"A": given})


def least_seconds(function, times=12):
    """The least time of a call; the first warms up."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        found.append(time.perf_counter() - began)
    return min(found[1:])
