"""Three counts of matmul FLOPs that agree to the last one, in every family of encoders, and what is refused."""

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from roofline.counts import compare_counts, count_closed_form, count_fvcore, count_torch
from roofline.layers import UnknownLayer, by_kind, list_layers
from roofline.model import cost, is_matmul
from roofline.record import count_flops
from roofline.times import make_call, tiny
from tasks.embedding import Embedder

LENGTH = 32
WINDOW = 16  # of ModernBERT's local attention
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 2}
TINY = {"vocab_size": 305, "hidden_size": 32, "intermediate_size": 64, **HEADS}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
BOTH_WAYS = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
T5 = {"vocab_size": 305, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 2}

ENCODERS = {
    "BERT": transformers.BertConfig(**TINY),
    "RoBERTa": transformers.RobertaConfig(**TINY, max_position_embeddings=514),
    "MPNet": transformers.MPNetConfig(**TINY, max_position_embeddings=514),
    "ALBERT": transformers.AlbertConfig(**TINY, embedding_size=16),
    "ELECTRA": transformers.ElectraConfig(**TINY, embedding_size=16),
    "DistilBERT": transformers.DistilBertConfig(vocab_size=305, dim=32, n_layers=2, n_heads=2, hidden_dim=64),
    "ModernBERT": transformers.ModernBertConfig(**TINY, **IDS, local_attention=WINDOW),
    "ModernBERT, global every 2nd": transformers.ModernBertConfig(
        **TINY, **IDS, local_attention=WINDOW, global_attn_every_n_layers=2, norm_bias=True, hidden_activation="relu"
    ),
    "DeBERTa-v2, absolute": transformers.DebertaV2Config(**TINY),
    "DeBERTa-v2": transformers.DebertaV2Config(**TINY, **BOTH_WAYS),
    "DeBERTa-v2, one way": transformers.DebertaV2Config(**TINY, relative_attention=True, pos_att_type=["p2c"]),
    # its 2 · 16 positions are as many as the 32 tokens
    "DeBERTa-v3": transformers.DebertaV2Config(
        **TINY, **BOTH_WAYS, position_buckets=16, share_att_key=True, norm_rel_ebd="layer_norm", type_vocab_size=0
    ),
    "DeBERTa-v2, convolution": transformers.DebertaV2Config(
        **TINY,
        **BOTH_WAYS,
        position_buckets=8,
        share_att_key=True,
        conv_kernel_size=3,
        conv_groups=2,
        embedding_size=16,
    ),
    "T5": transformers.T5Config(**T5),
    "T5, gated": transformers.T5Config(**T5, feed_forward_proj="gated-gelu"),
    "UMT5": transformers.UMT5Config(**T5, feed_forward_proj="gated-gelu"),
}


def embed(config, attention="eager"):
    auto_model = transformers.AutoModelForTextEncoding if "t5" in config.model_type else transformers.AutoModel
    transformer = auto_model.from_config(config, attn_implementation=attention).eval()
    if getattr(transformer, "pooler", None) is not None:
        transformer.pooler = None
    return Embedder(transformer, 2, 0).eval()


def kinds_of(name, length=LENGTH):
    return {kind["kind"]: kind for kind in by_kind(list_layers(embed(ENCODERS[name]), length))}


@pytest.mark.parametrize("name", ENCODERS)
def test_three_counts_agree_in_every_module(name):
    embedder = embed(ENCODERS[name])
    for length in (5, WINDOW, 2 * WINDOW, 3 * WINDOW):
        layers, counts = count_flops(embedder, length)
        assert counts["closed_form_flops"] == 2 * counts["fvcore_macs"] == counts["torch_flops"] > 0
        assert all(cost(layer, 1, length).outputs > 0 for layer in layers)


@pytest.mark.parametrize("name", ENCODERS)
def test_the_closed_form_holds_for_a_larger_batch(name):
    embedder = embed(ENCODERS[name]).requires_grad_(False)
    ids = torch.full((3, LENGTH), 5)
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        embedder(ids, torch.ones_like(ids))
    matmuls = [layer for layer in list_layers(embedder, LENGTH) if is_matmul(layer)]
    assert sum(m["calls"] * cost(m, 3, LENGTH).flops for m in matmuls) == counter.get_total_flops()


def test_a_local_window_is_a_mask_over_all_scores():
    length = 4 * WINDOW
    kinds = kinds_of("ModernBERT", length)
    for kind in ("QKᵀ", "AV"):
        assert (kinds[kind]["calls"], cost(kinds[kind], 1, length).flops) == (2, 2 * length * length * 32)
    assert kinds["QKV"]["shape"] == {"inputs": 32, "outputs": 96}
    assert kinds["FFN 1"]["shape"] == {"inputs": 32, "outputs": 128} and kinds["FFN 2"]["shape"]["inputs"] == 64
    assert cost(kinds["gate product"], 1, length).flops == length * 64
    assert cost(kinds["rotary embedding"], 1, length).flops == 3 * 2 * length * 32  # queries and keys


def test_disentangled_attention_derives_by_hand():
    kinds = kinds_of("DeBERTa-v3")
    for way in ("c2p", "p2c"):  # 2 layers; 2 · 16 relative positions
        assert (kinds[way]["calls"], cost(kinds[way], 1, LENGTH).flops) == (2, 2 * LENGTH * 32 * 32)
    projection = kinds["position projection"]  # with the weights of Q and of K, in 2 layers
    assert (projection["calls"], projection["shape"]["rows"]) == (4, 32)
    assert cost(projection, 1, LENGTH) == cost(projection, 8, LENGTH)  # a batch shares the positions
    assert cost(kinds["position LayerNorm"], 8, LENGTH).outputs == 32 * 32


def test_t5s_encoder_derives_by_hand():
    kinds = kinds_of("T5, gated")
    assert kinds["RMSNorm"]["calls"] == 2 * 2 + 1 and kinds["RMSNorm"]["shape"]["parameters"] == 32
    assert kinds["Q"]["shape"] == {"inputs": 32, "outputs": 16}  # 2 heads of 8, narrower than the model
    assert kinds["FFN 1"]["calls"] == kinds["FFN gate"]["calls"] == kinds["gate product"]["calls"] == 2
    assert (kinds["position bias gather"]["calls"], kinds["position bias add"]["calls"]) == (1, 2)
    kinds = kinds_of("UMT5")  # a table of biases for each layer
    assert (kinds["position bias gather"]["calls"], kinds["position bias add"]["calls"]) == (2, 2)


def test_kinds_add_up_to_the_layers():
    layers = list_layers(embed(ENCODERS["ALBERT"]), LENGTH)

    def total(rows):
        return sum(r["calls"] * cost(r, 1, LENGTH).flops for r in rows)

    assert total(by_kind(layers)) == total(layers)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_kind_of_layer_can_be_timed_in_the_models_shapes(name):
    for layer in by_kind(list_layers(embed(ENCODERS[name]), LENGTH)):
        for shape, batch, length in ((layer, 3, LENGTH), (tiny(layer), 1, 1)):
            function, inputs, weights = make_call(shape, batch, length, "cpu")
            if layer["op"] != "table":  # which is gathered once, whatever the batch
                assert function(*inputs, *weights).numel() == cost(shape, batch, length).outputs, layer


# --- what is refused -----------------------------------------------------------------


def test_attention_that_fvcore_does_not_see_is_an_error():
    with pytest.raises(UnknownLayer, match="scaled_dot_product_attention"):
        count_fvcore(embed(ENCODERS["BERT"], attention="sdpa"), LENGTH)


def test_a_matmul_outside_the_closed_form_is_named():
    class Self(transformers.models.bert.modeling_bert.BertSelfAttention):
        def forward(self, hidden, *args, **options):
            output, weights = super().forward(hidden, *args, **options)
            return output + hidden @ hidden.transpose(1, 2) @ hidden, weights

    embedder = embed(ENCODERS["BERT"])
    embedder.transformer.encoder.layer[1].attention.self.__class__ = Self
    closed = count_closed_form(list_layers(embedder, LENGTH), LENGTH)
    with pytest.raises(UnknownLayer, match=r"encoder.layer.1.attention.self: .* finds [\d,]+ matmul FLOPs"):
        compare_counts(closed, count_fvcore(embedder, LENGTH), count_torch(embedder, LENGTH))


def test_what_no_matmul_shows_is_named_too():
    with pytest.raises(SystemExit, match="found .*RoFormerSinusoidalPositionalEmbedding"):
        count_flops(embed(transformers.RoFormerConfig(**TINY)), LENGTH)
    embedder = embed(ENCODERS["BERT"])
    layer = embedder.transformer.encoder.layer[1].intermediate
    del layer.intermediate_act_fn
    layer.intermediate_act_fn = torch.nn.functional.gelu  # a plain function is no module
    with pytest.raises(SystemExit, match="found aten::gelu, called 2 times; the closed form has it 1 times"):
        count_flops(embedder, LENGTH)


def test_a_pooler_is_named_and_no_graph_holds_it():
    embedder = Embedder(transformers.AutoModel.from_config(ENCODERS["BERT"], attn_implementation="eager").eval(), 2, 0)
    with pytest.raises(SystemExit, match="pooler"):
        count_flops(embedder.eval(), LENGTH)


def test_an_activation_of_a_convolution_that_is_not_known_is_named():
    config = transformers.DebertaV2Config(**TINY, conv_kernel_size=3, conv_act="silu")
    with pytest.raises(UnknownLayer, match="encoder.conv.conv/activation"):
        list_layers(embed(config), LENGTH)
