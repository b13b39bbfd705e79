"""capacity.py: every answer and refusal on made-up results, and the page of the worked example on the committed ones."""

import os
import re

import pytest
import report_data as data
from conftest import ROOT, run, run_here

import capacity as script
from core.record import results_folder
from reporting import capacity
from roofline.gpus import read_hardware

PAGE = ROOT / "deploy/capacity.md"
RATES = [data.rate(30.0, 40.0), data.rate(50.0, 60.0), data.rate(70.0, 140.0), data.rate(85.0, 900.0)]
LOAD = ("--rps", 120, "--p99-ms", 100)


@pytest.fixture
def place(tmp_path):
    """Results of a classifier on one machine: rates, and two levels."""
    place = data.make_place(tmp_path)
    place.folder, place.model = place.results / "reviews" / "a-cpu", data.classifier(slug="reviews")
    place.rows = [data.level("ensemble", 60.0), data.level("ensemble", 100.0, 8)]
    data.write_perf(place.folder, place.model, place.rows, engines={}, rates=RATES)
    return place


def ask(place, *options):
    return run_here(script, "--results", place.results, "--model", "reviews", *options)


def answer(place, *options):
    """What is printed where there is an answer."""
    done = ask(place, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_peers(place, model, **facts):
    systems = [
        {"name": "another", "start_s": [1.0]},
        {"name": "project", "start_s": [4.0, 6.0, 5.0], "executed_by": "FP32"},
        {"name": "BF16", "start_s": [3.0], "executed_by": "BF16"},
    ]
    content = {"settings": {"base": "project"}, "systems": systems} | facts
    data.write(place.folder, "peers", data.record(model, **content))


# --- requests ------------------------------------------------------------------------


def test_replicas_are_the_peak_over_the_highest_rate_that_meets_the_target_and_one(place):
    text = answer(place, *LOAD)
    assert "replicas: 4: 120 requests/s at the peak ÷ 50.0 of one, rounded up, and 1 to spare" in text
    lines = {line.split()[0]: line for line in text.splitlines() if line.startswith("   ")}
    assert lines["50.0"].endswith("meets it") and lines["70.0"].endswith("p99 is too high")
    assert "replicas: 3: 100 requests/s" in answer(place, "--rps", 100, "--p99-ms", 100)  # exactly two, and one
    assert "replicas: 2: 1.0 requests/s" in answer(place, "--rps", 1, "--p99-ms", 100)
    assert "÷ 85.0 of one" in answer(place, "--rps", 1, "--p99-ms", 900)


def test_the_peak_of_a_day_is_its_mean_times_the_factor(place):
    text = answer(place, "--a-day", 864000, "--peak-factor", 12, "--p99-ms", 100)
    assert "target: 120 requests/s at the peak (864,000 a day, × 12), p99 at most 100 ms" in text
    assert "replicas: 4:" in text


def test_what_counts_is_the_rate_that_was_answered_in_requests(place):
    rates = [data.rate(50.0, 60.0, throughput_infer_per_s=4 * 48.0, batch_size=4)]
    data.write_perf(place.folder, place.model, place.rows, rates=rates)
    assert "÷ 48.0 of one" in answer(place, *LOAD)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"latency_p99_ms": None}, "too few requests for a p99"),
        ({"lost": 1}, "requests were lost"),
        ({"throughput_infer_per_s": 40.0}, "fell behind, or the window was too short"),
        ({"error": "a request failed"}, "refused: a request failed"),
        ({"latency_p99_ms": 101.0}, "p99 is too high"),
    ],
)
def test_a_rate_above_one_that_does_not_hold_counts_no_more(place, facts, words):
    rates = [data.rate(70.0, 60.0), data.rate(50.0, 60.0) | facts, data.rate(30.0, 40.0, stable=False)]
    data.write_perf(place.folder, place.model, place.rows, rates=rates)
    text = answer(place, *LOAD)
    assert words in text and "÷ 30.0 of one" in text and "meets it, unstable" in text


def test_no_rate_meets_the_target_is_said_with_the_nearest(place):
    done = ask(place, "--rps", 120, "--p99-ms", 39)
    assert done.returncode == 1 and "replicas" not in done.stdout
    assert (
        "expected a rate that meets it, found none; the nearest has 40.0 ms at 30.0 requests/s: p99 is" in done.stderr
    )
    data.write_perf(place.folder, place.model, place.rows, rates=[data.rate(30.0, None)])
    done = ask(place, *LOAD)
    assert done.returncode == 1 and "no p99 was measured" in done.stderr


def test_rates_that_were_not_measured_are_not_invented(place):
    data.write_perf(place.folder, place.model, place.rows)
    done = ask(place, *LOAD, "--texts", 1e6)
    assert done.returncode == 1 and "not measured; ./perf.py --rates measures them" in done.stderr
    assert "replicas" not in done.stdout and "machine hours: texts.txt" in done.stdout
    assert ask(place, *LOAD, "--served", "tokenizer").returncode == 1


def test_a_start_costs_the_requests_of_its_replica(place):
    assert "start of a replica: not measured; bench/peers.py" in answer(place, *LOAD)
    assert "8.0 s (as typed), without" in (text := answer(place, *LOAD, "--start-s", 8))
    assert "320 requests come for it meanwhile" in text  # 120 ÷ 3 a second
    write_peers(place, place.model)
    assert "5.0 s (project)" in answer(place, *LOAD) and "8.0 s (as typed)" in answer(place, *LOAD, "--start-s", 8)
    server = {"name": "triton", "version": "2.51.0", "protocol": "grpc", "engines": {}, "executed_by": "BF16"}
    data.write_perf(place.folder, place.model, place.rows, rates=RATES, server=server)
    assert "3.0 s (BF16)" in answer(place, *LOAD)
    write_peers(place, place.model | {"reference_sha256": "c" * 64})
    assert "start of a replica: not measured" in answer(place, *LOAD)


# --- texts ---------------------------------------------------------------------------


def test_what_longer_texts_cost(place):
    assert "longer texts: not measured; python -m bench.length measures them" in answer(place, *LOAD)
    data.write_length(place.folder, place.model, (0.010, 0.072), (1e9, 12.5e9))
    text = answer(place, *LOAD)
    assert "one at a time, ONNX Runtime, FP32:" in text and " 512 tokens      72.0 ms, × 7.20" in text


def test_machine_hours_come_from_what_was_measured(place):
    text = answer(place, "--texts", 3.6e6)
    assert "10.0 machine hours: texts.txt, 2 texts, through the server, concurrency 8" in text
    assert "by length: not measured" in text and "replicas" not in text
    data.write_length(place.folder, place.model, (0.010, 0.072), (1e9, 12.5e9))
    summary = {"rows": 2000, "tokens": 30000, "run": {"rows": 1000, "wall_s": 5.0}}
    data.write(place.folder, "embed", data.record(place.model, summary=summary))
    text = answer(place, "--texts", 3.6e6)
    assert "10.0 machine hours: texts of 64 tokens" in text and "72.0 machine hours: texts of 512 tokens" in text
    assert "5.0 machine hours: texts of 15 tokens in the mean, embed.py" in text


def test_lengths_alone_answer_for_texts(place):
    (place.folder / "perf.json").unlink()
    data.write_length(place.folder, place.model, (0.010, 0.072), (1e9, 12.5e9))
    text = answer(place, "--texts", 3.6e6)
    assert "through the server: not measured; ./perf.py" in text and "72.0 machine hours" in text


def test_what_a_gpu_can_do_at_best_is_a_bound_of_the_same_weights(place):
    asked = ("--texts", 3.6e6, "--gpu", "L4")
    assert "hours of one L4 at best: not counted; ./complexity.py" in answer(place, *asked)
    data.write_complexity(place.results / "other" / "a-cpu", data.card(weights_sha256="c" * 64))
    assert "not counted" in answer(place, *asked)
    encoder = data.card(weights_sha256=place.model["weights_sha256"], reference_sha256="d" * 64)
    shapes = {"linear": {"inputs": 4, "outputs": 4}, "activation": {"width": 4, "flops_per_element": 8}}
    kinds = [
        {"kind": op, "op": op, "shape": shape, "calls": 1000, "example": op, "name": op} for op, shape in shapes.items()
    ]
    content = {"kinds": kinds, "length": 128}
    data.write(place.results / "encoder" / "b-cpu", "complexity", data.record(encoder, **content))
    text = answer(place, *asked)
    assert "hours of one L4 at best" in text and "a bound from its data sheet, not a measurement" in text
    # bytes bound both: 8 a token and float of the Linear and of the activation, and its weights once a batch
    found = dict(re.findall(r"(\w+) ([\d.]+)", text.split("texts of 128 tokens: ")[1]))
    gpu = read_hardware()["L4"]
    seconds = 1000 * (2 * 1024 * 128 * 8 * 4 + 4 * 16) / gpu["bandwidth"]
    assert float(found["FP32"]) == pytest.approx(3.6e6 * seconds / 1024 / 3600, rel=0.05)
    data.write_length(place.folder, place.model, (0.010, 0.072), (1e9, 12.5e9))
    assert "texts of 512 tokens: FP32" in answer(place, *asked)
    kinds[0]["shape"]["rows"] = 7  # a table as long as the texts that were counted
    data.write(place.results / "encoder" / "b-cpu", "complexity", data.record(encoder, **content))
    assert "texts of 512 tokens: FP32" not in (text := answer(place, *asked)) and "texts of 128 tokens: FP32" in text


# --- which results -------------------------------------------------------------------


def test_of_several_machines_one_is_chosen(place):
    other = place.folder.with_name("b-cpu")
    data.write_perf(other, place.model, place.rows)
    assert "÷ 50.0 of one" in answer(place, *LOAD)  # the other has no rates
    data.write_perf(other, place.model, place.rows, rates=[data.rate(20.0, 50.0)])
    done = ask(place, *LOAD)
    assert done.returncode == 1 and "expected one machine, found a-cpu, b-cpu; choose with --machine" in done.stderr
    assert "÷ 20.0 of one" in answer(place, *LOAD, "--machine", "b-cpu")
    done = ask(place, *LOAD, "--machine", "c-cpu")
    assert done.returncode == 1 and "on that machine, found none; ./perf.py --rates" in done.stderr


def test_a_repository_names_its_results_and_no_others(tiny, tmp_path):
    from core.repository import read_card

    card = read_card(tiny.repository)
    folder = results_folder(tmp_path / "results", card)
    options = ("--results", tmp_path / "results", "--repository", tiny.repository, *LOAD)
    data.write_perf(folder, card, [data.level("ensemble", 60.0)], rates=RATES)
    done = run_here(script, *options)
    assert done.returncode == 0 and "÷ 50.0 of one" in done.stdout, done.stderr
    data.write_perf(folder, card | {"reference_sha256": "c" * 64}, [data.level("ensemble", 60.0)], rates=RATES)
    done = run_here(script, *options)
    assert done.returncode == 1 and "expected results of this export, found none" in done.stderr


@pytest.mark.parametrize("content", [[1], {"rates": []}])
def test_a_file_that_is_no_record_is_named(place, content):
    data.write(place.folder, "peers", content)
    done = ask(place, *LOAD)
    assert done.returncode == 1 and "peers.json: expected a record of a measurement" in done.stderr


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--rps", 5),
        ("--p99-ms", 5),
        ("--rps", 0, "--p99-ms", 5),
        ("--rps", "nan", "--p99-ms", 5),
        ("--a-day", 5, "--p99-ms", 5),
        ("--texts", -1),
        ("--rps", 5, "--a-day", 5, "--peak-factor", 2, "--p99-ms", 5),
    ],
)
def test_bad_usage_exits_2(place, options):
    assert ask(place, *options).returncode == 2


def test_an_unknown_gpu_is_named(place):
    done = ask(place, "--texts", 5, "--gpu", "T5")
    assert done.returncode == 1 and "expected a GPU of hardware.csv, found T5" in done.stderr


def test_numbers_are_short():
    assert [capacity.number(x) for x in (30222.4, 57.87, 0.1234)] == ["30,222", "57.9", "0.12"]


# --- the page ------------------------------------------------------------------------


def test_the_page_shows_what_the_committed_results_give():
    """PAGES=1 writes it anew, after a measurement."""

    def shown(block):
        done = run(*block[1].split()[1:], cwd=ROOT)
        return f"```console\n{block[1]}\n{(done.stdout + done.stderr).rstrip()}\n```"

    page = PAGE.read_text(encoding="utf-8")
    found, count = re.subn(r"```console\n(\$ .*)\n(?:(?!```).*\n)*```", shown, page)
    assert count == 2
    if os.environ.get("PAGES"):
        PAGE.write_text(found, encoding="utf-8")
    else:
        assert page == found, "the results give another answer; PAGES=1 ./test.sh tests/test_capacity.py writes it"
