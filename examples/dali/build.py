#!/usr/bin/env python3
"""Write a repository that reads JPEG files: a DALI pipeline before a small image model with seeded weights.

Reads:  nothing.
Writes: --output: the serialized pipeline, the model, the ensemble "images"; beside it image.jpg and image.json, its bytes.
Run:    ./examples/dali/build.py
Prints: what the model is, then the folder to serve

Packages: pip install --no-deps --target build/dali/packages -r examples/dali/requirements.txt
"""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's modules, from wherever it is called

from core.arguments import make_parser
from core.files import ROOT, replace_folder_when_done, write_json

HERE = Path(__file__).resolve().parent
PACKAGES = ROOT / "build" / "dali" / "packages"
INSTALL = "pip install --no-deps --target build/dali/packages -r examples/dali/requirements.txt"
LABEL = "seeded random weights: its scores mean nothing"
RECORD = "images.json"
SIZE, CLASSES, CHANNELS = 224, 10, 16
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet's pixels, 0 to 255
ENSEMBLE = """name: "images"
platform: "ensemble"
max_batch_size: 8
input [ { name: "IMAGE", data_type: TYPE_UINT8, dims: [ -1 ] } ]
output [ { name: "SCORES", data_type: TYPE_FP32, dims: [ %(classes)d ] } ]
ensemble_scheduling {
  step [
    {
      model_name: "preprocess"
      model_version: -1
      input_map { key: "IMAGE" value: "IMAGE" }
      output_map { key: "PIXELS" value: "PIXELS" }
    },
    {
      model_name: "network"
      model_version: -1
      input_map { key: "PIXELS" value: "PIXELS" }
      output_map { key: "SCORES" value: "SCORES" }
    }
  ]
}
"""
NETWORK = """name: "network"
platform: "onnxruntime_onnx"
max_batch_size: 8
input [ { name: "PIXELS", data_type: TYPE_FP32, dims: [ 3, %(size)d, %(size)d ] } ]
output [ { name: "SCORES", data_type: TYPE_FP32, dims: [ %(classes)d ] } ]
dynamic_batching {}
"""


def find_packages():
    """Put the example's packages before the others, which may have a folder nvidia too; exits where there are none."""
    sys.path.insert(0, str(PACKAGES))
    importlib.invalidate_caches()
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        raise SystemExit(f"nvidia.dali: expected the package in {PACKAGES}, found none; {INSTALL}")


def serialize_pipeline(max_batch_size=8):
    """The pipeline as Triton's DALI backend reads it: JPEG -> float32 [3, 224, 224], all on the CPU."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=max_batch_size, num_threads=1, device_id=None, output_dtype=types.FLOAT, output_ndim=3)
    def preprocess():
        files = fn.external_source(name="IMAGE", device="cpu", dtype=types.UINT8, ndim=1)
        pixels = fn.decoders.image(files, device="cpu", output_type=types.RGB)
        pixels = fn.resize(pixels, resize_x=SIZE, resize_y=SIZE)
        return fn.crop_mirror_normalize(pixels, dtype=types.FLOAT, output_layout="CHW", mean=list(MEAN), std=list(STD))

    return preprocess().serialize()


def make_network(seed):
    """A convolution, its mean over the image and a linear layer, as ONNX, with weights of the seed."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(seed)
    weights = {
        "convolution": generator.normal(0, 0.1, (CHANNELS, 3, 7, 7)),
        "linear": generator.normal(0, 1, (CLASSES, CHANNELS)),
    }
    nodes = [
        helper.make_node("Conv", ["PIXELS", "convolution"], ["maps"], strides=[4, 4]),
        helper.make_node("Relu", ["maps"], ["active"]),
        helper.make_node("GlobalAveragePool", ["active"], ["means"]),
        helper.make_node("Flatten", ["means"], ["features"]),
        helper.make_node("Gemm", ["features", "linear"], ["logits"], transB=1),
        helper.make_node("Softmax", ["logits"], ["SCORES"]),
    ]
    tensors = [
        helper.make_tensor_value_info("PIXELS", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE]),
        helper.make_tensor_value_info("SCORES", TensorProto.FLOAT, ["batch", CLASSES]),
    ]
    constants = [numpy_helper.from_array(values.astype(np.float32), name) for name, values in weights.items()]
    graph = helper.make_graph(nodes, "network", tensors[:1], tensors[1:], constants, doc_string=LABEL)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)


def make_image(width=320, height=240, seed=0):
    """The bytes of a JPEG file: a few soft patches of colour."""
    import io

    import numpy as np
    from PIL import Image

    patches = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(patches).resize((width, height), Image.BICUBIC).save(file, "JPEG", quality=50)
    return file.getvalue()


def write_repository(output, seed):
    """All models in one folder, replaced at once."""
    import onnx

    sizes = {"classes": CLASSES, "size": SIZE}
    with replace_folder_when_done(output) as temporary:
        for name in ("preprocess", "network", "images"):
            (temporary / name / "1").mkdir(parents=True)
        shutil.copyfile(HERE / "config.pbtxt", temporary / "preprocess" / "config.pbtxt")
        (temporary / "preprocess/1/model.dali").write_bytes(serialize_pipeline())
        (temporary / "network/config.pbtxt").write_text(NETWORK % sizes)
        onnx.save(make_network(seed), temporary / "network/1/model.onnx")
        (temporary / "images/config.pbtxt").write_text(ENSEMBLE % sizes)
        write_json(temporary / RECORD, {"weights": LABEL, "seed": seed})


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the model's weights")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "dali" / "repository")
    args = parser.parse_args()
    if args.output.exists() and not (args.output / RECORD).is_file():
        parser.error(f"--output: expected a new folder or one of this script, found {args.output}; name another")
    return args


def main():
    args = parse_args()
    find_packages()
    write_repository(args.output, args.seed)
    image = make_image()
    args.output.with_name("image.jpg").write_bytes(image)
    args.output.with_name("image.json").write_text(json.dumps(list(image)))
    print(f"network: {LABEL}")
    print(args.output)


if __name__ == "__main__":
    main()
