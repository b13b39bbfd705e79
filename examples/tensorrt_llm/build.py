#!/usr/bin/env python3
"""Build a repository that serves a causal model with TensorRT-LLM's LLM API. It was not executed by the authors.

Reads:  --tensorrt-llm: a clone of TensorRT-LLM at the tag of the container; config.pbtxt and model.yaml beside this file.
Writes: --output: tensorrt_llm with the clone's model.py, this config and this model.yaml.
Run:    ./examples/tensorrt_llm/build.py --tensorrt-llm build/TensorRT-LLM
Prints: the path of the repository.

--stream: every piece of a text is an answer. The model then has no /infer and no /generate, only /generate_stream.
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's modules, from wherever it is called

from core.arguments import make_parser
from core.files import ROOT, replace_folder_when_done

HERE = Path(__file__).resolve().parent
MODEL = "triton_backend/all_models/llmapi/tensorrt_llm/1"
DECOUPLED = "model_transaction_policy {\n  decoupled: true\n}\n"


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--tensorrt-llm", type=Path, required=True, help="clone of TensorRT-LLM")
    parser.add_argument("--model", help="folder in the container, or hub id (default: that of model.yaml)")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / "build/tensorrt_llm/repository")
    args = parser.parse_args()
    source = args.tensorrt_llm / MODEL
    if not (source / "model.py").is_file():
        raise SystemExit(
            f"--tensorrt-llm: expected {MODEL}/model.py in it, found none at {source}; clone a tag that has it, such as v1.2.1"
        )
    config, options = ((HERE / name).read_text(encoding="utf-8") for name in ("config.pbtxt", "model.yaml"))
    if args.model:
        options = options.replace("model: /checkpoint", f"model: {args.model}")
    if args.stream:
        config, options = config + DECOUPLED, options.replace("decoupled: false", "decoupled: true")
    with replace_folder_when_done(args.output / "tensorrt_llm") as folder:
        shutil.copytree(source, folder / "1")
        (folder / "config.pbtxt").write_text(config, encoding="utf-8")
        (folder / "1/model.yaml").write_text(options, encoding="utf-8")
    print(args.output)


if __name__ == "__main__":
    main()
