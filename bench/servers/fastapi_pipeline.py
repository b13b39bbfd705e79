"""FastAPI in front of transformers' pipeline, as most tutorials have it: a synchronous endpoint, no batching."""

import argparse


def make_app(model, threads):
    import torch
    import transformers
    from fastapi import Body, FastAPI

    torch.set_num_threads(threads)
    classify_text = transformers.pipeline("text-classification", model=model, device="cpu")
    app = FastAPI()

    @app.post("/classify")
    def classify(text: str = Body(embed=True)):
        return classify_text(text, truncation=True)[0]

    return app


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of the checkpoint")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args, _ = parser.parse_known_args()  # the other server's options are passed too
    import uvicorn

    uvicorn.run(make_app(args.model, args.threads), host="127.0.0.1", port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
