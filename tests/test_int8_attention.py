"""Attention's own products in INT8: found by structure, close to the reference, and there only where asked for."""

from types import SimpleNamespace

import onnx
import pytest
from conftest import link_copy, run_here
from onnx import TensorProto, helper

import quantize
from core import files
from core.repository import graph_path, graph_properties, read_card, tokenizer_path
from core.tokens import load_tokenizer
from precision import calibration, int8_attention, int8_search, surgery
from tasks.table import TASKS

KEYS = ("TRT_INT8", "TRT_BEST")


def quantized(tiny, folder, *options):
    """The tiny classifier with INT8 and BEST of a search with these options."""
    one = SimpleNamespace(repository=link_copy(tiny.repository, folder / "tiny"), results=folder / "results")
    options += ("--repository", one.repository, "--results", one.results)
    done = run_here(quantize, "--quick", "--only", "INT8", "BEST", *options)
    assert done.returncode == 0, done.stderr
    return one


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    return quantized(tiny, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def attention(tiny, tmp_path_factory):
    return quantized(tiny, tmp_path_factory.mktemp("attention"), "--attention")


def operand_makers(graph, names):
    """{(node name, what makes an operand of it)} of some nodes."""
    producer = surgery.GraphIndex(graph).producer
    return {(n.name, producer[name].op_type) for n in graph.graph.node if n.name in names for name in n.input}


@pytest.mark.parametrize("key", KEYS)
def test_both_operands_of_every_product_are_quantized_where_that_is_asked_for(tiny, plain, attention, key):
    reference = onnx.load(graph_path(tiny.repository, "ONNX"))
    scores, probabilities = int8_attention.attention_products(reference)
    names = {node.name for node in scores + probabilities}
    assert len(scores) == len(probabilities) == 2 and len(names) == 4  # of two layers
    found = onnx.load(graph_path(attention.repository, key))
    assert operand_makers(found, names) == {(name, "DequantizeLinear") for name in names}
    without = onnx.load(graph_path(plain.repository, key))
    assert "DequantizeLinear" not in {kind for _, kind in operand_makers(without, names)}
    digests = [graph_properties(graph)["recipe_sha256"] for graph in (found, without)]
    assert digests[0] != digests[1]  # one of each is refused together


def test_without_the_products_the_graph_is_that_of_before(plain, attention):
    """What --attention adds are the pairs of the products, and no other node."""
    kept = []
    for one in (plain, attention):
        graph = onnx.load(graph_path(one.repository, "TRT_INT8"))
        kept.append({n.name: n.op_type for n in graph.graph.node})
        assert len({i.name for i in graph.graph.initializer}) == len(graph.graph.initializer)
    added = kept[1].keys() - kept[0].keys()
    assert kept[0].keys() <= kept[1].keys() and len(added) == 16  # a pair for each of eight operands
    assert {kept[1][name] for name in added} == {"QuantizeLinear", "DequantizeLinear"}


def test_values_stay_close_and_the_record_says_what_was_measured(tiny, attention):
    card = read_card(tiny.repository)
    parts, _ = calibration.load_texts(None, load_tokenizer(tokenizer_path(tiny.repository)), card, 8)
    reference, task = onnx.load(graph_path(tiny.repository, "ONNX")), TASKS[card["task"]]
    expected = int8_search.run_graph(reference, parts["selection"], task)
    (path,) = attention.results.rglob("sensitivity.json")
    record = files.read_json(path, "")
    assert record["attention"] is True
    for key in KEYS:
        graph = onnx.load(graph_path(attention.repository, key))
        found = int8_search.measure(graph, expected, parts["selection"], task)
        assert found["relative_l2_error"] == pytest.approx(record["reached"][key[4:]]["relative_l2_error"], rel=1e-3)
        assert found["mean_cosine"] > 0.99 and int8_search.meets(found, record["target"])


def test_probabilities_reach_from_zero_to_one(attention):
    graph = onnx.load(graph_path(attention.repository, "TRT_INT8"))
    index = surgery.GraphIndex(graph)
    pairs = [n for n in index.nodes if n.op_type == "QuantizeLinear"]
    steps = [index.array(n.input[1]) for n in pairs if index.producer[n.input[0]].op_type == "Softmax"]
    assert [127 * step.item() for step in steps] == pytest.approx([1, 1])


def test_a_product_that_no_softmax_reads_is_none_of_attention():
    nodes = [
        helper.make_node("Neg", ["x"], ["a"], name="a"),
        helper.make_node("MatMul", ["a", "a"], ["angles"], name="angles"),
        helper.make_node("MatMul", ["angles", "w"], ["y"], name="linear"),
        helper.make_node("Softmax", ["y"], ["z"], name="softmax"),
    ]
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 4]) for name in "xz"]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 4], [0.0] * 16)
    graph = helper.make_model(helper.make_graph(nodes, "g", tensors[:1], tensors[1:], [weight]))
    assert int8_attention.attention_products(graph) == ([], [])
    with pytest.raises(SystemExit, match="before and behind a Softmax, found none; leave it out"):
        int8_attention.find_product_steps(graph, {}, {})


def test_the_option_without_a_graph_in_int8_is_bad_usage():
    done = run_here(quantize, "--attention", "--only", "FP16")
    assert done.returncode == 2 and "--attention: expected INT8 or BEST among --precisions, found FP16" in done.stderr
