#!/usr/bin/env python3
"""Build a SavedModel with seeded weights and the same model as ONNX, each as a Triton server takes it.

Reads:  config.pbtxt and requirements.txt beside this file.
Writes: --output: repository/ with saved_model and converted, environment/ with TensorFlow, expected.json.
Run:    ./examples/tensorflow/build.py
Prints: the command that serves both.
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's modules, from wherever it is called

from core.arguments import make_parser
from core.files import ROOT
from serving.environments import environment_parameter, make_environment, run

HERE = Path(__file__).resolve().parent


def write_config(folder, config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.pbtxt").write_text(config, encoding="utf-8")


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "build/tensorflow")
    args = parser.parse_args()
    output = args.output.resolve()
    environment, repository = output / "environment", output / "repository"
    make_environment(environment, HERE / "requirements.txt")
    saved_model, converted = repository / "saved_model", repository / "converted"
    shutil.rmtree(repository, ignore_errors=True)
    config = (HERE / "config.pbtxt").read_text(encoding="utf-8")
    write_config(saved_model, config + environment_parameter(environment))
    onnx = config.replace('"saved_model"', '"converted"').replace("tensorflow_savedmodel", "onnxruntime_onnx")
    write_config(converted, onnx)
    for folder in (saved_model, converted):
        (folder / "1").mkdir()
    made = saved_model / "1/model.savedmodel"
    run(environment / "bin/python", HERE / "make_model.py", made, output / "expected.json")
    graph = converted / "1/model.onnx"
    run(environment / "bin/python", "-m", "tf2onnx.convert", "--saved-model", made, "--output", graph)
    print(f"./serve.sh start --device cpu --any-repository {args.output}/repository")


if __name__ == "__main__":
    main()
