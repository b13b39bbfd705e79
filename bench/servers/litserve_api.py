"""LitServe with a checkpoint in torch: one worker, batches of whatever comes within 2 ms."""

import argparse

import litserve
from torch_classifier import open_classifier

BATCH, WAIT_S = 32, 0.002


class Classifier(litserve.LitAPI):
    def __init__(self, model, threads):
        super().__init__(max_batch_size=BATCH, batch_timeout=WAIT_S, api_path="/classify")
        self.source, self.threads = model, threads

    def setup(self, device):
        self.classify = open_classifier(self.source, self.threads)

    def decode_request(self, request):
        return request["text"]

    def batch(self, inputs):
        return list(inputs)

    def predict(self, texts):
        return self.classify(texts)

    def unbatch(self, output):
        return output

    def encode_response(self, output):
        return output


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of the checkpoint")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args, _ = parser.parse_known_args()  # the other servers' options are passed too
    server = litserve.LitServer(
        Classifier(args.model, args.threads), accelerator="cpu", workers_per_device=1, fast_queue=True
    )
    server.run(host="127.0.0.1", port=args.port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
