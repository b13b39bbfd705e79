#!/usr/bin/env python3
"""Build a repository that serves SmolLM2-135M-Instruct (real weights, from a pip package) with vLLM.

Reads:  config.pbtxt and the requirements beside this file.
Writes: --output: repository/ with smollm2, its checkpoint/, environment/ with vLLM, expected.json.
Run:    ./examples/vllm/build.py
Prints: the command that serves it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's modules, from wherever it is called

from core.arguments import make_parser
from core.files import ROOT, write_json
from serving.environments import environment_parameter, make_environment, run

HERE = Path(__file__).resolve().parent
# FP32, so that its texts are those of transformers; eager, so that nothing is compiled for minutes at the start
ENGINE = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 8, "enforce_eager": True}
# for pictures and sound; PyPI's are for the CUDA build of torch, and beside the CPU's an import of them fails
UNUSED = ("torchvision", "torchaudio", "torchcodec")


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "build/vllm")
    args = parser.parse_args()
    output = args.output.resolve()
    environment, checkpoint, model = output / "environment", output / "checkpoint", output / "repository/smollm2"
    make_environment(environment, HERE / "requirements.txt", HERE / "requirements-no-deps.txt", without=UNUSED)
    run(environment / "bin/python", HERE / "make_checkpoint.py", checkpoint, output / "expected.json")
    (model / "1").mkdir(parents=True, exist_ok=True)
    config = (HERE / "config.pbtxt").read_text(encoding="utf-8")
    (model / "config.pbtxt").write_text(config + environment_parameter(environment), encoding="utf-8")
    write_json(model / "1/model.json", {"model": str(checkpoint)} | ENGINE)
    print(f"./serve.sh start --device cpu --any-repository {args.output}/repository")


if __name__ == "__main__":
    main()
