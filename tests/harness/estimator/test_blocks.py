from __future__ import annotations

import pytest
import timm
import torch
import transformers
from torch import nn
from torch.nn.utils import spectral_norm as spectral_norm_of_old
from torch.nn.utils import weight_norm as weight_norm_of_old
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.nn.utils.parametrize import register_parametrization

from harness import find_blocks
from harness.errors import UserError
from harness.estimator.blocks import unclassified
from spectra_db.words import PARTITIONS

from .models import GPT

# With the oldest versions that pyproject allows.
STACKED = pytest.mark.skipif(
    int(transformers.__version__.partition(".")[0]) < 5,
    reason="transformers before 5 has a module for each expert, or no such model",
)


def gpt2():
    config = transformers.GPT2Config(
        n_layer=1, n_embd=12, n_head=2, vocab_size=20, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


MODELS = {
    "gpt2": gpt2,
    "timm vit": lambda: timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32),
    "timm mixer": lambda: timm.create_model("mixer_s32_224", img_size=32),
    "torch encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 16), 1),
    "lstm": lambda: nn.Sequential(nn.Embedding(5, 4), nn.LSTM(4, 4, num_layers=2)),
    "own gpt": GPT,
}


def kinds(model, partition="weights"):
    return {block.name: block.kind for block in find_blocks(model, partition)}


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_disjoint_and_all_and_full_cover_every_parameter(name, partition):
    model = MODELS[name]()
    hits = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for block in find_blocks(model, partition):
        size = 0
        for part in block.parts:
            part.of(hits[part.parameter]).add_(1)
            size += part.of(hits[part.parameter]).numel()
        assert block.num_params == size
    counts = torch.cat([h.flatten() for h in hits.values()])
    assert counts.max() == 1
    if partition in ("all", "full"):
        assert counts.min() == 1


def test_fused_weights_are_split_along_the_output_dimension():
    model = gpt2()
    blocks = {b.name: b for b in find_blocks(model)}
    key = blocks["transformer.h.0.attn.c_attn.weight[k]"]
    weight = model.transformer.h[0].attn.c_attn.weight  # Conv1D: (in, out)
    assert torch.equal(key.parts[0].of(weight), weight[:, 12:24])
    encoder = MODELS["torch encoder"]()
    value = {b.name: b for b in find_blocks(encoder)}["layers.0.self_attn.in_proj_weight[v]"]
    fused = encoder.layers[0].self_attn.in_proj_weight  # (out, in)
    assert torch.equal(value.parts[0].of(fused), fused[24:])


def test_tied_weights_are_one_block_under_the_first_name():
    found = kinds(gpt2())
    assert found["transformer.wte.weight"] == "embedding"
    assert "lm_head.weight" not in found


def test_weights_leave_out_norms_biases_and_class_tokens_and_keep_positions():
    found = kinds(MODELS["timm vit"]())
    assert found["pos_embed"] == "position"
    assert found["head.weight"] == "head"
    assert "cls_token" not in found
    assert not any("norm" in name or "bias" in name for name in found)


def test_layers_hold_the_weights_of_one_repeated_module_together():
    layers = {b.name: b for b in find_blocks(gpt2(), "layers")}
    assert list(layers) == ["transformer.wte", "transformer.wpe", "transformer.h.0"]
    assert [b.kind for b in layers.values()] == ["embedding", "position", "layer"]
    assert layers["transformer.h.0"].num_params == 12 * (3 * 12 + 12 + 2 * 48)
    convs = find_blocks(timm.create_model("resnet10t", num_classes=3), "layers")
    stem = ["conv1.0", "conv1.3", "conv1.6"]  # one weight each
    assert [b.name for b in convs] == [*stem, *(f"layer{i}.0" for i in (1, 2, 3, 4)), "fc"]
    plain = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), weight_norm(nn.Linear(2, 2)))
    assert [b.name for b in find_blocks(plain, "layers")] == ["0", "2"]
    lstm = nn.LSTM(4, 4, num_layers=2)
    assert [b.name for b in find_blocks(nn.ModuleDict({"lstm": lstm}), "layers")] == ["lstm"]


def test_heads_cut_queries_and_keys_alone_and_are_those_that_attention_uses():
    heads = {b.name: b for b in find_blocks(gpt2(), "heads")}
    weight = "transformer.h.0.attn.c_attn.weight"
    cut = [name for name in heads if name.startswith(weight)]
    assert cut == [f"{weight}[{x}]" for x in ("q][0", "q][1", "k][0", "k][1", "v")]
    assert heads[f"{weight}[k][1]"].shape == (12, 6)
    assert heads[f"{weight}[k][1]"].parts[0].start == 12 + 6
    others = {b.name for b in find_blocks(gpt2()) if b.kind not in ("query", "key")}
    assert others < set(heads)
    # A query's head that is zero gives uniform attention in that head alone.
    attention = nn.MultiheadAttention(8, 2, bias=False)
    (first, *_) = find_blocks(nn.ModuleDict({"attn": attention}), "heads")
    with torch.no_grad():
        first.parts[0].of(attention.in_proj_weight).zero_()
    x = torch.randn(5, 1, 8, generator=torch.Generator().manual_seed(0))
    _, maps = attention(x, x, x, average_attn_weights=False)
    assert torch.allclose(maps[0, 0], torch.full((5, 5), 0.2))
    assert not torch.allclose(maps[0, 1], torch.full((5, 5), 0.2))


@pytest.mark.parametrize(
    "family", ["llama", "bert", "t5", pytest.param("deepseek_v3", marks=STACKED)]
)
def test_heads_are_as_many_as_the_configuration_says(family):
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "vocab_size": 20, "num_hidden_layers": 1}
    sizes |= {"intermediate_size": 16}
    given = {
        "llama": sizes | {"num_key_value_heads": 2},
        "bert": sizes,
        "t5": {"d_model": 16, "d_kv": 8, "num_heads": 4, "d_ff": 16, "num_layers": 1,
               "vocab_size": 20, "num_decoder_layers": 1},
        "deepseek_v3": sizes | {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8,
                                "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
                                "first_k_dense_replace": 1},
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(family, **given[family])
    kind = transformers.AutoModelForSeq2SeqLM if family == "t5" else transformers.AutoModel
    with torch.device("meta"):
        model = kind.from_config(config)
    blocks = find_blocks(model, "heads")
    queries = [b for b in blocks if b.kind == "query" and b.name.endswith("]")]
    keys = [b for b in blocks if b.kind == "key" and b.name.endswith("]")]
    layers = 3 if family == "t5" else 1  # encoder, decoder and what it sees of the encoder
    assert len(queries) == 4 * layers
    expected = {"llama": 2, "deepseek_v3": 0}  # its keys and values are one latent projection
    assert len(keys) == expected.get(family, 4) * layers


def test_heads_that_nothing_tells_stay_whole():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    names = [b.name for b in find_blocks(nn.ModuleDict({"attn": Bare()}), "heads")]
    assert names == ["attn.query.weight", "attn.key.weight", "attn.value.weight"]


def test_paper_adds_the_biases_of_the_same_modules_and_nothing_else():
    model = MODELS["torch encoder"]()
    added = set(kinds(model, "paper")) - set(kinds(model))
    layers = ("self_attn.in_proj", "self_attn.out_proj.", "linear1.", "linear2.")
    joint = ["_" if name.endswith("in_proj") else "" for name in layers]
    assert added == {f"layers.0.{n}{j}bias" for n, j in zip(layers, joint, strict=True)}


def test_paper_keeps_the_blocks_that_match_and_reads_brackets_literally():
    patterns = ["*c_attn.weight[q]", "*wte*"]
    blocks = find_blocks(gpt2(), "paper", paper_blocks=patterns)
    names = [b.name for b in blocks]
    assert names == ["transformer.wte.weight", "transformer.h.0.attn.c_attn.weight[q]"]
    with pytest.raises(UserError, match="no block matches 'layer7'"):
        find_blocks(gpt2(), "paper", paper_blocks=["layer7"])


def test_recurrent_weights_and_state_parameters_have_kinds_of_their_own():
    assert set(kinds(MODELS["lstm"]()).values()) == {"embedding", "recurrent"}
    config = transformers.MambaConfig(num_hidden_layers=1, hidden_size=8, vocab_size=9)
    with torch.device("meta"):
        mamba = transformers.MambaForCausalLM(config)
    every, weights = kinds(mamba, "all"), kinds(mamba)
    assert every["backbone.layers.0.mixer.A_log"] == "state"
    assert "state" not in weights.values()
    assert weights["backbone.layers.0.mixer.x_proj.weight"] == "recurrent"


def test_frozen_parameters_belong_to_no_block_and_a_frozen_model_is_refused():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    assert list(kinds(model, "all")) == ["1.weight", "1.bias"]
    model.requires_grad_(False)
    with pytest.raises(UserError, match="no trainable parameter"):
        find_blocks(model)


def test_unknown_partition_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="weights, paper, all, full"):
        find_blocks(nn.Linear(1, 1), "layer")


def test_parametrized_weights_are_blocks_of_the_kinds_that_they_had():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.ModuleDict({"qkv": spectral_norm(nn.Linear(6, 18))})
            self.fc1 = weight_norm(nn.Linear(6, 4))
            self.head = orthogonal(nn.Linear(4, 4))

    assert kinds(Net()) == {
        "attn.qkv.parametrizations.weight.original[q]": "query",
        "attn.qkv.parametrizations.weight.original[k]": "key",
        "attn.qkv.parametrizations.weight.original[v]": "value",
        "fc1.parametrizations.weight.original1": "mlp",
        "head.parametrizations.weight.original": "head",
    }
    assert unclassified(Net()) == []


def test_the_output_of_attention_is_known_by_its_module_whatever_its_name():
    assert kinds(nn.ModuleDict({"mix": nn.MultiheadAttention(4, 2), "head": nn.Linear(4, 2)})) == {
        **{f"mix.in_proj_weight[{kind[0]}]": kind for kind in ("query", "key", "value")},
        "mix.out_proj.weight": "attention_output",
        "head.weight": "head",
    }


def meta(create):
    with torch.device("meta"):
        return create()


def of_transformers(config, **options):
    small = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 9, "n_positions": 8}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return transformers.AutoModel.from_config(config(**small, **ids, **options))


@pytest.mark.parametrize(
    ("create", "name"),
    [
        (lambda: timm.create_model("tiny_vit_5m_224"), "stages.1.blocks.0.attn.qkv.weight"),
        (lambda: timm.create_model("coatnet_0_rw_224"), "stages.2.blocks.0.attn.qkv.weight"),
        (
            lambda: of_transformers(transformers.CodeGenConfig, rotary_dim=4),
            "h.0.attn.qkv_proj.weight",
        ),
        (
            lambda: of_transformers(transformers.GPTBigCodeConfig, multi_query=False),
            "h.0.attn.c_attn.weight",
        ),
    ],
    ids=["tiny vit", "coatnet", "codegen", "gpt bigcode"],
)
def test_fused_weights_that_interleave_heads_are_left_whole(create, name):
    found = kinds(create())
    assert found[name] == "attention"
    assert f"{name}[q]" not in found


def test_fused_weights_of_parts_of_unknown_sizes_are_left_whole():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn = nn.ModuleDict(
                {"qkv_proj": nn.Linear(8, 16), "o_proj": nn.Linear(8, 8)}
            )
            self.attn = nn.ModuleDict({"qkv": nn.Conv2d(8, 17, 1), "proj": nn.Conv2d(8, 8, 1)})
            self.mixer = nn.ModuleDict({"in_proj": nn.Linear(8, 32)})
            self.head = nn.Linear(8, 2)

    assert kinds(Grouped()) == {
        "self_attn.qkv_proj.weight": "attention",
        "self_attn.o_proj.weight": "attention_output",
        "attn.qkv.weight": "attention",
        "attn.proj.weight": "attention_output",
        "mixer.in_proj.weight": "recurrent",
        "head.weight": "head",
    }


class Attention(nn.Module):
    """Attention of 4 heads of 2 dimensions that says how many its keys have, by any names."""

    def __init__(self, fused, outputs, **sizes):
        super().__init__()
        self.add_module(fused, nn.Linear(8, outputs))
        self.o_proj = nn.Linear(8, 8)
        for name, value in sizes.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("fused", "outputs", "sizes", "expected"),
    [
        ("qkv_proj", 16, {"num_heads": 4, "num_kv_heads": 2, "head_dim": 2}, (8, 4, 4)),
        ("Wqkv", 12, {"n_head": 4, "n_local_heads": 1, "dim": 8}, (8, 2, 2)),
        ("c_attn", 16, {"n_head": 4, "n_rep": 2, "head_dim": 2}, (8, 4, 4)),
        ("to_qkv", 36, {"heads": 4, "dim_head": 3}, (12, 12, 12)),
        ("kv_proj", 8, {"num_heads": 4, "num_key_value_groups": 2, "head_dim": 2}, (4, 4)),
    ],
)
def test_fused_weights_are_split_where_their_module_knows_the_sizes(
    fused, outputs, sizes, expected
):
    blocks = [b for b in find_blocks(Attention(fused, outputs, **sizes)) if "o_proj" not in b.name]
    assert tuple(b.shape[0] for b in blocks) == expected
    assert [b.kind for b in blocks] == ["query", "key", "value"][-len(expected) :]
    assert [b.parts[0].stop for b in blocks[:-1]] == [b.parts[0].start for b in blocks[1:]]


def test_phi3_splits_its_grouped_queries_as_it_does_itself():
    config = transformers.Phi3Config(
        hidden_size=16, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1,
        intermediate_size=8, vocab_size=9, pad_token_id=0,
    )  # fmt: skip
    found = {b.name: b.shape for b in find_blocks(meta(lambda: transformers.Phi3Model(config)))}
    sizes = {"q": 16, "k": 8, "v": 8}
    for letter, size in sizes.items():
        assert found[f"layers.0.self_attn.qkv_proj.weight[{letter}]"] == (size, 16)


def linears(*names):
    return nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in names})


@pytest.mark.parametrize(
    "names",
    [
        *(("c_q", "c_k", "c_v", "c_proj"), ("w_q", "w_k", "w_v", "w_o")),
        *(("W_Q", "W_K", "W_V", "W_O"), ("toQuery", "toKey", "toValue", "unify_out")),
        *(("proj_q", "proj_k", "proj_v", "proj_o"), ("linear_q", "linear_k", "linear_v", "o")),
        *(("qproj", "kproj", "vproj", "oproj"), ("q_a_proj", "k_b_proj", "v_b_proj", "o_proj")),
        *(("w_qs", "w_ks", "w_vs", "fc"), ("to_q", "to_k", "to_v", "to_out")),
        ("lin_query", "lin_key", "lin_value", "out_lin"),
        *(("q_linear", "k_linear", "v_linear", "out"), ("wq_b", "wk", "wv", "wo")),
        *(("query_layer", "key_layer", "value_layer", "dense"), ("fc_q", "fc_k", "fc_v", "fc_o")),
    ],
)  # fmt: skip
def test_projections_are_known_by_the_names_that_people_give_them(names):
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"attn": linears(*names)})])})
    expected = ["query", "key", "value", "attention_output"]
    assert [block.kind for block in find_blocks(model)] == expected
    flat = nn.ModuleDict({"layers": nn.ModuleList([linears(*names, "fc1", "fc2")])})
    assert [block.kind for block in find_blocks(flat)][-2:] == ["mlp", "mlp"]
    assert [block.kind for block in find_blocks(flat)][:3] == expected[:3]
    assert not any(block.is_guessed for block in [*find_blocks(model), *find_blocks(flat)])


def test_keys_and_values_of_a_feed_forward_network_are_none_of_attention():
    named = nn.ModuleDict({"ffn": linears("key", "receptance", "value"), "head": nn.Linear(8, 2)})
    assert set(kinds(named).values()) == {"mlp", "head"}
    memory = nn.ModuleDict({"key": nn.Linear(8, 32), "value": nn.Linear(32, 8)})
    unnamed = nn.ModuleDict({"blocks": nn.ModuleList([memory]), "head": nn.Linear(8, 2)})
    assert set(kinds(unnamed).values()) == {"mlp", "head"}
    rwkv = linears("receptance", "key", "value", "output")
    mixed = nn.ModuleDict({"att": rwkv, "head": nn.Linear(8, 2)})
    assert list(kinds(mixed).values())[:-1] == ["attention", "key", "value", "attention_output"]


def test_what_lies_in_attention_and_is_not_known_is_attention_and_a_guess():
    model = nn.ModuleDict({"attn": linears("q", "k", "v", "gate", "o"), "head": nn.Linear(8, 2)})
    guessed = {b.name: b.kind for b in find_blocks(model) if b.is_guessed}
    assert guessed == {"attn.gate.weight": "attention"}


def test_projections_by_convolutions_of_one_pixel_are_projections():
    names = ("query_conv", "key_conv", "value_conv", "proj")
    attention = nn.ModuleDict({name: nn.Conv2d(8, 8, 1) for name in names})
    attention["local"], attention["squeeze"] = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 1)
    model = nn.ModuleDict({"attention": attention, "conv": nn.Conv2d(8, 8, 1)})
    model["head"] = nn.Conv2d(8, 2, 1)
    expected = ["query", "key", "value", "attention_output", "conv", "conv", "conv", "head"]
    assert list(kinds(model).values()) == expected


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter, bare or of two layers."""

    def __init__(self, inputs, outputs, *, bare):
        super().__init__()
        self.base_layer = nn.Linear(inputs, outputs).requires_grad_(False)
        if bare:
            self.lora_A = nn.Parameter(torch.randn(2, inputs))
            self.lora_B = nn.Parameter(torch.zeros(outputs, 2))
        else:
            self.lora_A = nn.ModuleDict({"default": nn.Linear(inputs, 2, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(2, outputs, bias=False)})


@pytest.mark.parametrize("bare", [True, False])
def test_low_rank_adapters_have_the_kind_of_what_they_adapt(bare):
    names = {"q_proj": "query", "c_attn": "attention", "o_proj": "attention_output"}
    attn = nn.ModuleDict({name: Adapted(8, 8, bare=bare) for name in names})
    mlp = nn.ModuleDict({"up_proj": Adapted(8, 16, bare=bare)})
    model = nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict({"attn": attn, "mlp": mlp})])})
    expected = [kind for kind in (*names.values(), "mlp") for _ in "AB"]
    assert [block.kind for block in find_blocks(model)] == expected
    assert not any(block.is_guessed for block in find_blocks(model))


def test_an_adapter_that_parametrizes_a_weight_has_its_kind():
    class Update(nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_A, self.lora_B = (
                nn.Parameter(torch.ones(2, 8)),
                nn.Parameter(torch.ones(8, 2)),
            )

        def forward(self, w):
            return w + self.lora_B @ self.lora_A

    layer = nn.ModuleDict({"attn": linears("q", "k", "v", "o")}).requires_grad_(False)
    register_parametrization(layer["attn"]["v"], "weight", Update())
    assert list(kinds(layer).values()) == ["value", "value"]


TINY = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 13,
}  # fmt: skip
EXPERTS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {
        "num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8,
    },
    "GptOss": {"num_local_experts": 4, "head_dim": 8},
    "DeepseekV3": {
        "n_routed_experts": 4, "moe_intermediate_size": 8, "first_k_dense_replace": 0, "n_group": 2,
        "topk_group": 1, "q_lora_rank": 4, "kv_lora_rank": 4, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4, "v_head_dim": 8, "num_experts_per_tok": 2,
    },
}  # fmt: skip


@STACKED
@pytest.mark.parametrize("family", EXPERTS)
def test_stacked_experts_and_their_router_are_blocks_of_a_mixture(family):
    config = getattr(transformers, f"{family}Config")(**TINY, **EXPERTS[family])
    model = meta(lambda: getattr(transformers, f"{family}ForCausalLM")(config))
    found = kinds(model)
    router = "router" if family == "GptOss" else "gate"
    layer = "model.layers.0.mlp"
    for name in (f"{layer}.experts.gate_up_proj", f"{layer}.experts.down_proj"):
        assert found[name] == "mlp"
    assert found[f"{layer}.{router}.weight"] == "mlp"
    assert unclassified(model) == []
    assert not any(block.is_guessed for block in find_blocks(model))


@STACKED
def test_latent_projections_are_queries_where_they_are_queries_alone():
    config = transformers.DeepseekV3Config(**TINY, **EXPERTS["DeepseekV3"])
    found = kinds(meta(lambda: transformers.DeepseekV3Model(config)))
    attention = "layers.0.self_attn"
    assert found[f"{attention}.q_a_proj.weight"] == found[f"{attention}.q_b_proj.weight"] == "query"
    assert found[f"{attention}.kv_a_proj_with_mqa.weight"] == "attention"
    assert found[f"{attention}.kv_b_proj.weight"] == "attention"


class GraphAttentionLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.ones(6, 4))
        self.a = nn.Parameter(torch.ones(8, 1))  # a vector


class KANLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.base_weight = nn.Parameter(torch.ones(4, 6))
        self.spline_weight = nn.Parameter(torch.ones(4, 6, 5))


class Lookup(nn.Module):
    def __init__(self):
        super().__init__()
        self.latents, self.pos_table = (
            nn.Parameter(torch.ones(3, 6)),
            nn.Parameter(torch.ones(9, 6)),
        )


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (GraphAttentionLayer, {"W": "attention?"}),
        (KANLinear, {"base_weight": "mlp?", "spline_weight": "mlp?"}),
        (Lookup, {"latents": "embedding", "pos_table": "position"}),
        (lambda: nn.LSTMCell(6, 4), {"weight_ih": "recurrent", "weight_hh": "recurrent"}),
        (lambda: nn.Bilinear(6, 3, 4), {"weight": "mlp?"}),
    ],
    ids=["graph attention", "kan", "latents", "lstm cell", "bilinear"],
)
def test_bare_matrices_are_blocks_and_what_is_guessed_says_so(layer, expected):
    model = nn.ModuleDict({"layer1": layer(), "head": nn.Linear(4, 2)})
    blocks = [block for block in find_blocks(model) if block.kind != "head"]
    found = {b.name.removeprefix("layer1."): b.kind + "?" * b.is_guessed for b in blocks}
    assert found == expected
    assert unclassified(model) == []


def test_the_bare_projections_of_xlnet_are_those_of_attention():
    config = transformers.XLNetConfig(d_model=16, n_layer=1, n_head=2, d_inner=24, vocab_size=13)
    found = kinds(meta(lambda: transformers.XLNetModel(config)))
    expected = {"q": "query", "k": "key", "v": "value", "o": "attention_output", "r": "attention"}
    assert {n: found[f"layer.0.rel_attn.{n}"] for n in expected} == expected


@pytest.mark.parametrize("normalize", [weight_norm_of_old, spectral_norm_of_old])
def test_what_older_parametrizations_compute_a_weight_from_has_its_kind(normalize):
    attn = nn.ModuleDict({"q": normalize(nn.Linear(8, 8)), "k": nn.Linear(8, 8)})
    found = kinds(nn.ModuleDict({"attn": attn, "conv": normalize(nn.Conv2d(3, 4, 3))}))
    assert sorted(found.values()) == ["conv", "key", "query"]


def test_an_entry_names_kinds_itself_and_what_is_no_weight():
    model = nn.ModuleDict({"layer": KANLinear(), "attn": nn.ModuleDict({"qkv": nn.Linear(4, 12)})})
    given = {"layer.base_*": "head", "*spline*": "other", "attn.qkv.weight[q]": "key"}
    found = find_blocks(model, kinds=given)
    assert {b.name: b.kind for b in found} == {
        "layer.base_weight": "head",
        **{f"attn.qkv.weight[{kind[0]}]": kind for kind in ("key", "value")},
        "attn.qkv.weight[q]": "key",
    }
    assert not any(block.is_guessed for block in found)
    assert [b.name for b in unclassified(model, given)] == ["layer.spline_weight"]
    assert find_blocks(model, kinds={"*.qkv.weight": "attention"})[-1].shape == (12, 4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"*": "brain"}, "the kind of '\\*' is 'brain'; choose one of embedding, "),
        (
            {"*.lora": "mlp"},
            "no block matches '\\*.lora'; the trainable parameters are weight, bias",
        ),
    ],
)
def test_kinds_that_an_entry_can_not_give_are_refused(given, said):
    with pytest.raises(UserError, match=said):
        find_blocks(nn.Linear(2, 2), kinds=given)


def test_a_name_alone_makes_no_weight_a_norm_or_a_state():
    class NormalizedLinear(nn.Linear):
        pass

    class NormedProduct(nn.Module):
        def __init__(self):
            super().__init__()
            self.A, self.D = nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(2, 4))
            self.scale, self.shift_bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.eye(4))

    model = nn.ModuleDict({"fc": NormalizedLinear(4, 4), "low_rank": NormedProduct()})
    assert kinds(model) == {"low_rank.A": "mlp", "low_rank.D": "mlp", "fc.weight": "head"}
    assert {block.name for block in unclassified(model)} == {"low_rank.shift_bias"}
    assert kinds(model, "all")["low_rank.scale"] == "norm"


def test_what_is_compiled_has_the_names_and_kinds_of_what_is_not():
    def net():
        return nn.Sequential(nn.ModuleDict({"attn": nn.MultiheadAttention(6, 2)}), nn.Linear(6, 2))

    inside = net()
    inside[0]["attn"] = torch.compile(inside[0]["attn"])
    for model in (torch.compile(net()), inside):
        assert kinds(model, "all") == kinds(net(), "all")
        assert find_blocks(model)[-1].parts[0].parameter in dict(model.named_parameters())
