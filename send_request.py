#!/usr/bin/env python3
"""Ask any model of a running Triton server about texts, and print its answers.

Reads:  texts: arguments, lines of --file, or lines of standard input (-). Names, types and dims: from the server.
Writes: nothing.
Run:    ./send_request.py -m reviews -o LABEL:SCORE "a warm, witty film"
Prints: one line for each text, the outputs with a TAB between; several values of one output have a comma between.
        If there are several texts, each answer stands behind its text. --json: one JSON object for each text.

Several inputs: -i QUESTION:CONTEXT, and each text has their values with a TAB between. A number, true, false or an
array is written as JSON: [1, 0.5, 3]. A text that fails is named on standard error, the others are answered, and the
exit status is 1. Plain numbers are rounded; --json has all digits.
"""

import itertools
import json
import os
import signal
import sys
from pathlib import Path

from core.arguments import make_parser

# what Triton or its client give a meaning of their own
RESERVED = ("sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "headers", "binary_data_output")


# --- options ---------------------------------------------------------------------------


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="- alone: the lines of standard input")
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument(
        "-i", "--input", action="append", metavar="NAMES", help="inputs, A:B (default: the one that is needed)"
    )
    parser.add_argument("-o", "--output", action="append", metavar="NAMES", help="outputs, A:B (default: all)")
    parser.add_argument("--file", type=Path, help="one text a line, UTF-8")
    parser.add_argument("-u", "--url", help="HOST:PORT (default: where serve.sh starts)")
    parser.add_argument("--protocol", choices=("http", "grpc"), default="http")
    parser.add_argument("--batch-size", type=int, default=1, help="texts in one request (default: %(default)s)")
    parser.add_argument(
        "--parameter", action="append", default=[], metavar="KEY=VALUE", help="of the request: a number, bool or text"
    )
    parser.add_argument("--stream", action="store_true", help="print each piece of an answer when it comes")
    parser.add_argument(
        "--statistics", action="store_true", help="what the server counted meanwhile, on standard error"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--timeout-s", type=float, default=600, help="for each request (default: %(default)s)")
    args = parser.parse_args()
    if bool(args.texts) == bool(args.file):
        parser.error("expected either texts, --file or - for standard input")
    for name in ("batch_size", "timeout_s"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')}: expected more than 0, found {getattr(args, name)}")
    try:
        args.parameters = dict(map(read_parameter, args.parameter))
    except ValueError as error:
        parser.error(f"--parameter: expected {error}")
    return args


def read_parameter(text):
    """(key, value) of KEY=VALUE: what JSON reads as number, bool or string is one, all else the text as it is."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise ValueError(f"KEY=VALUE, found {text}")
    if key in RESERVED or key.startswith("triton_"):
        raise ValueError(f"a name that Triton does not reserve, found {key}; reserved: {', '.join(RESERVED)}, triton_…")
    try:
        read = json.loads(value, parse_constant=lambda name: name)
    except ValueError:
        read = value
    if isinstance(read, int) and not -(2**63) <= read < 2**63:
        raise ValueError(f"an integer of 64 bits, found {value}")
    return key, read if isinstance(read, int | float | str) else value


def choose_names(given, tensors, option):
    """Names of A:B, of which one may hold colons itself; exits with the list of those that there are."""
    names = [name for part in given for name in ([part] if part in tensors else part.split(":"))]
    from serving.requests import describe

    for name in names:
        if name not in tensors:
            raise SystemExit(f"{option}: expected names of {describe(tensors)}; found {name}")
    if len(set(names)) < len(names):
        raise SystemExit(f"{option}: expected each name once, found {':'.join(names)}")
    return names


def choose_inputs(given, model):
    """The inputs that the texts are for: those of -i, or the only one that is needed."""
    from serving.requests import describe

    needed = [name for name, tensor in model.inputs.items() if not tensor.optional]
    if not given and len(needed or model.inputs) == 1:
        return needed or list(model.inputs)
    names = choose_names(given or [], model.inputs, "--input")
    if not names or set(needed) - set(names):
        optional = {name: tensor for name, tensor in model.inputs.items() if tensor.optional}
        hint = f" (these may be left out: {', '.join(optional)})" if optional else ""
        raise SystemExit(
            f"--input: expected all that {model.name} needs of {describe(model.inputs)}{hint}; found "
            f"{':'.join(names) or 'none'}; e.g. -i {':'.join(needed or list(model.inputs)[:1])}"
        )
    return names


def check_batch_size(args, model):
    """Exit where the model takes fewer texts in one request."""
    limit = 1 if model.decoupled else max(1, model.max_batch_size)
    if args.batch_size > limit:
        reason = "which answers in pieces" if model.decoupled else f"max_batch_size {model.max_batch_size}"
        raise SystemExit(f"--batch-size: expected at most {limit} ({model.name}, {reason}), found {args.batch_size}")


def read_texts(args):
    """The texts, lines of standard input as they come. An empty line is an empty text: answers stay in step."""
    if args.file:
        try:
            with open(args.file, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
                return [line.rstrip("\r\n") for line in file]
        except OSError as error:
            raise SystemExit(f"--file {args.file}: expected a text file, found {error.strerror}") from None
    if args.texts != ["-"]:
        return args.texts
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    return (line.rstrip("\r\n") for line in sys.stdin)


# --- answers ----------------------------------------------------------------------------


def show(value):
    """A value as people read it."""
    if isinstance(value, list):
        return ",".join(map(show, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def show_answer(text, answer, inputs, args):
    """The line of an answer; a lone text is not repeated, and its answer may have several lines."""
    if args.json:
        fields = dict(zip(inputs, text.split("\t") if len(inputs) > 1 else [text], strict=True))
        return json.dumps(fields | answer, ensure_ascii=False)
    line = "\t".join(map(show, answer.values()))
    return f"{text}\t{line}".replace("\n", "\\n") if args.several else line


def print_stream(text, pieces, inputs, args):
    """Print pieces as they come: one output as running text, several outputs or --json as a line for each piece."""
    running = False
    try:
        for piece in pieces:
            if args.json or len(piece) > 1:
                print(show_answer(text, piece, inputs, args), flush=True)
                continue
            if args.several and not running:
                print(text, end="\t")
            running = True
            (value,) = piece.values()
            print(show(value), end="", flush=True)
    finally:
        if running:
            print(flush=True)


def answer_batch(server, model, batch, names, args):
    """An answer for each text, or the FailedError that says why there is none; None where it was printed already."""
    from serving.requests import FailedError, ask_each, join, make_rows, stream

    inputs, outputs = names
    found = []
    for text in batch:
        try:
            found.append(make_rows(text.split("\t") if len(inputs) > 1 else [text], model, inputs))
        except FailedError as error:
            found.append(error)
    rows = [row for row in found if isinstance(row, dict)]
    if not model.decoupled:
        answers = iter(ask_each(server, model, rows, outputs, args.parameters))
        return [next(answers) if isinstance(row, dict) else row for row in found]
    if not rows:
        return found
    pieces = stream(server, model, rows[0], outputs, args.parameters)
    try:
        if args.stream:
            return [print_stream(batch[0], pieces, inputs, args)]
        return [join(list(pieces), outputs, model)]
    except FailedError as error:
        return [error]


def answer_texts(server, model, texts, names, args):
    """Print an answer for each text; returns how many failed."""
    from tqdm import tqdm

    failed, numbers, texts = 0, itertools.count(1), iter(texts)
    # answers on the same terminal show how far it is
    with tqdm(total=args.total, unit="text", disable=not sys.stderr.isatty() or sys.stdout.isatty()) as bar:
        while batch := list(itertools.islice(texts, args.batch_size)):
            answers = answer_batch(server, model, batch, names, args)
            for text, answer, number in zip(batch, answers, numbers, strict=False):
                if isinstance(answer, Exception):
                    failed += 1
                    tqdm.write(f"text {number}: {answer}", file=sys.stderr)
                elif answer is not None:
                    print(show_answer(text, answer, names[0], args))
            sys.stdout.flush()
            bar.update(len(batch))
    return failed


# --- the command --------------------------------------------------------------------------


def run(args):
    """All steps; returns the exit status."""
    from serving.requests import FailedError, Server, read_model
    from serving.server import check_url, default_url
    from serving.statistics_table import print_statistics, read_statistics

    server = Server(args.url or default_url(args.protocol), args.protocol, args.timeout_s)
    check_url(server.url)
    try:
        model = read_model(server, args.model)
        names = choose_inputs(args.input, model), choose_names(args.output or model.outputs, model.outputs, "--output")
        check_batch_size(args, model)
        texts = read_texts(args)
        args.total = len(texts) if isinstance(texts, list) else None
        args.several = args.total is None or bool(args.file) or args.total > 1
        before = read_statistics(server) if args.statistics else None
        failed = answer_texts(server, model, texts, names, args)
        if args.statistics:
            print_statistics(before, read_statistics(server), model.name)
    except FailedError as error:
        raise SystemExit(f"--url {server.url}: expected a Triton server's answer, found: {error}") from None
    return 1 if failed else 0


def main():
    # not by KeyboardInterrupt, of which gevent inside the HTTP client prints a note
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    args = parse_args()
    # texts that are no UTF-8 are printed as they came
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    try:
        raise SystemExit(run(args))
    except BrokenPipeError:  # the reader has enough, as head has; Python would complain when it closes the output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
