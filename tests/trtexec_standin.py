#!/usr/bin/env python3
"""A stand-in for NVIDIA's trtexec, for tests on machines without TensorRT and GPU.

It compiles nothing. What it takes and prints follows public descriptions of the real one:
- the first line with the version, the order of steps, "Unknown option", the device lines:
  TensorRT's open-source samples/trtexec (release 10.x); from 11.0 on --fp16, --int8,
  --best and --stronglyTyped are unknown options;
- the layer file with --profilingVerbosity=detailed: examples in issues 4020 and 4397 of
  NVIDIA/TensorRT (LayerType, Inputs with Format/Datatype, TacticName, Metadata).
Its version, and what goes wrong, come from environment variables that only tests set:
STANDIN_VERSION (101601, 110000), STANDIN_FAIL (a word in the command at which to fail),
STANDIN_ERROR (the line to fail with), STANDIN_MODE (half: write half a plan, then fail;
hang: write half a plan, then wait; empty: an empty plan; int8-in-name-only).
"""

import json
import os
import sys
import time

import onnx

VERSION = os.environ.get("STANDIN_VERSION", "101601")
MODE = os.environ.get("STANDIN_MODE", "")
PRECISION_FLAGS = {"--fp16", "--int8", "--best", "--stronglyTyped"}
KNOWN = {"--onnx", "--saveEngine", "--minShapes", "--optShapes", "--maxShapes", "--skipInference", "--noTF32"}
KNOWN |= {"--profilingVerbosity", "--exportLayerInfo", "--timingCacheFile", "--memPoolSize"}
TYPES = {
    "INT8": ("Int8", "i8i8_i8i32_f32"),
    "FP16": ("Half", "f16f16_f16f16_f16"),
    "FP32": ("Float", "f32f32_tf32f32_f32"),
}


def finish(word, code):
    print(f"&&&& {word} TensorRT.trtexec [TensorRT v{VERSION}] # {' '.join(sys.argv)}")
    sys.exit(code)


def chosen_precision(path, flags):
    """What the real one would compute weight MatMuls in: Q/DQ and types rule, then the flags."""
    graph = onnx.load(path).graph
    if MODE != "int8-in-name-only" and any(n.op_type == "QuantizeLinear" for n in graph.node):
        return "INT8"
    typed_half = any(i.data_type == onnx.TensorProto.FLOAT16 and len(i.dims) == 2 for i in graph.initializer)
    return "FP16" if typed_half or flags & {"--fp16", "--best"} else "FP32"


def layers_of(path, precision):
    """One gemm layer per MatMul of the graph, in the detailed format."""
    data_type, tactic = TYPES[precision]
    layers = []
    for index, node in enumerate(onnx.load(path).graph.node):
        if node.op_type == "MatMul":
            layers.append(
                {
                    "Name": f"{node.name}_myl0_{index}",
                    "LayerType": "gemm",
                    "Inputs": [{"Name": "x", "Dimensions": [8, 128, 384], "Format/Datatype": data_type}],
                    "Outputs": [{"Name": "y", "Dimensions": [8, 128, 384], "Format/Datatype": "Half"}],
                    "TacticName": f"sm80_xmma_gemm_{tactic}_tn_n_tilesize64x64x64",
                    "Metadata": f"[ONNX Layer: {node.name}]\x1f[ONNX Layer: {node.name}_bias]",
                }
            )
    shape = {
        "Name": "shape_call",
        "LayerType": "shape_call",
        "Inputs": [{"Format/Datatype": "Int64"}],
        "Outputs": [],
        "Metadata": "",
    }
    return {"Layers": [*layers, shape], "Bindings" if VERSION < "11" else "I/O Tensors": ["INPUT_IDS", "EMBEDDING"]}


def main():
    print(f"&&&& RUNNING TensorRT.trtexec [TensorRT v{VERSION}] [b01] # {' '.join(sys.argv)}")
    options = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
    if not options or "--help" in options:
        print("=== Model Options ===\n  --onnx=<file>               ONNX model")
        return
    known = KNOWN | (PRECISION_FLAGS if VERSION < "11" else set())
    unknown = [name for name in options if name not in known]
    if unknown:
        print("=== Model Options ===\n  --onnx=<file>               ONNX model")
        print("".join(f"[E] Unknown option: {name} {options[name]}\n" for name in unknown), end="")
        finish("FAILED", 1)
    if "STANDIN_FAIL" in os.environ and os.environ["STANDIN_FAIL"] in " ".join(sys.argv):
        print(os.environ.get("STANDIN_ERROR", "[E] Engine could not be created from network"))
        finish("FAILED", 1)
    print("[I] === Device Information ===\n[I] Selected Device: NVIDIA Stand-in GPU\n[I] Compute Capability: 8.6")
    print(f"[I] TensorRT version: {int(VERSION) // 10000}.{int(VERSION) // 100 % 100}.{int(VERSION) % 100}")
    with open(options["--saveEngine"], "wb") as plan:
        plan.write(b"" if MODE == "empty" else b"half a plan")
    if MODE == "half":
        print("[E] Error saving engine to file.")
        finish("FAILED", 1)
    if MODE == "hang":
        print("waiting", flush=True)
        time.sleep(60)
    if MODE != "empty":
        with open(options["--saveEngine"], "ab") as plan:
            plan.write(b", and the other half " + options["--onnx"].encode())
    precision = chosen_precision(options["--onnx"], set(options))
    with open(options["--exportLayerInfo"], "w") as file:
        json.dump(layers_of(options["--onnx"], precision), file)
    finish("PASSED", 0)


if __name__ == "__main__":
    main()
