from __future__ import annotations

import pytest
import timm
import torch
import transformers
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from harness import find_blocks
from harness.errors import UserError
from harness.estimator.blocks import unclassified

from .models import GPT


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


@pytest.mark.parametrize("partition", ["weights", "paper", "all", "full"])
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
        find_blocks(nn.Linear(1, 1), "layers")


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
    found = kinds(meta(create))
    assert found[name] == "attention"
    assert f"{name}[q]" not in found


def test_fused_weights_of_unequal_parts_are_no_outputs_of_attention_and_no_convolutions():
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
        "attn.proj.weight": "conv",
        "mixer.in_proj.weight": "recurrent",
        "head.weight": "head",
    }


def test_a_name_alone_makes_no_weight_a_norm_or_a_state():
    class NormalizedLinear(nn.Linear):
        pass

    class NormedProduct(nn.Module):
        def __init__(self):
            super().__init__()
            self.A, self.D = nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(2, 4))
            self.scale, self.shift_bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.eye(4))

    model = nn.ModuleDict({"fc": NormalizedLinear(4, 4), "low_rank": NormedProduct()})
    assert kinds(model) == {"fc.weight": "head"}
    left_out = {block.name for block in unclassified(model)}
    assert left_out == {"low_rank.A", "low_rank.D", "low_rank.shift_bias"}
    assert kinds(model, "all")["low_rank.scale"] == "norm"


def test_what_is_compiled_has_the_names_and_kinds_of_what_is_not():
    def net():
        return nn.Sequential(nn.ModuleDict({"attn": nn.MultiheadAttention(6, 2)}), nn.Linear(6, 2))

    inside = net()
    inside[0]["attn"] = torch.compile(inside[0]["attn"])
    for model in (torch.compile(net()), inside):
        assert kinds(model, "all") == kinds(net(), "all")
        assert find_blocks(model)[-1].parts[0].parameter in dict(model.named_parameters())
