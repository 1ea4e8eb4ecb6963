"""Networks of libraries, built from plain options and without pretrained weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from harness.errors import UserError
from spectra_db.errors import hint


def timm_model(
    model_name: str, *, num_classes: int, in_channels: int, image_size: int, **options: Any
) -> nn.Module:
    """Build a model of timm by its name.

    Args:
        model_name: As in `timm.list_models()`.
        num_classes: Number of classes.
        in_channels: Channels of the images.
        image_size: Their side; passed on where the model has one fixed size.
        options: Further arguments of `timm.create_model`.
    """
    import timm

    if not timm.is_model(model_name):
        raise _unknown("timm", "model", model_name, timm.list_models())
    if timm.models.get_pretrained_cfg_value(model_name, "fixed_input_size"):
        options = {"img_size": image_size} | options
    try:
        return timm.create_model(
            model_name, pretrained=False, num_classes=num_classes, in_chans=in_channels, **options
        )
    except TypeError as error:  # that of its class, or of a dict on the way there
        raise UserError(
            f"timm's {model_name} doesn't take {', '.join(options) or 'the data'} ({error}); its "
            "class takes what its name fixes, as in timm.models.convmixer:ConvMixer?dim=64"
        ) from error


def transformers_model(
    model_type: str,
    *,
    head: str,
    vocab_size: int | None = None,
    context: int | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    in_channels: int | None = None,
    **options: Any,
) -> nn.Module:
    """Build a model of transformers by the type of its configuration.

    Without dropout, without a cache, and without ids of special tokens, whose defaults lie outside
    a vocabulary of characters. Of the arguments after `head` the configuration gets those that it
    has. Where positions are counted from the padding's id on, as RoBERTa's are, they begin at 0.

    Args:
        model_type: As in `transformers.CONFIG_MAPPING`: llama, mamba, vit, ...
        head: CausalLM, MaskedLM or ImageClassification.
        vocab_size: Size of the vocabulary, of a language model.
        context: Tokens of a sequence.
        num_classes: Number of classes, of a classifier of images.
        image_size: Side of the images.
        in_channels: Their channels.
        options: Fields of the configuration; they win.
    """
    import transformers

    if model_type not in transformers.CONFIG_MAPPING:
        raise _unknown("transformers", "type", model_type, transformers.CONFIG_MAPPING)
    default = transformers.AutoConfig.for_model(model_type)
    # A configuration takes any field, and a misspelt one without a word.
    fields = {*default.to_dict(), *default.attribute_map}
    strange = sorted(set(options) - fields)
    if strange:
        raise _unknown("transformers", f"field of {model_type}'s configuration", strange[0], fields)
    task = {
        "vocab_size": vocab_size,
        "max_position_embeddings": context,
        "max_target_positions": context,
        "num_labels": num_classes,
        "image_size": image_size,
        "num_channels": in_channels,
    }
    known = {k: v for k, v in task.items() if v is not None and hasattr(default, k)}
    dropout = {
        k: 0.0 for k in fields if ("dropout" in k or "pdrop" in k) and getattr(default, k, None)
    }
    # BERT's kin see both sides unless they are told to be decoders.
    fixed = {"use_cache": False, "is_decoder": head == "CausalLM", **_NO_IDS}
    fixed = {k: v for k, v in fixed.items() if k in fields}
    config = transformers.AutoConfig.for_model(model_type, **fixed | dropout | known | options)
    try:
        builder = getattr(transformers, f"AutoModelFor{head}")
        return _counting_from_0(builder.from_config(config))
    except ValueError as error:
        if "Unrecognized configuration" not in str(error):
            raise
        raise UserError(
            f"transformers has no {model_type} with the head {head}, which the task needs; "
            "choose another type or task"
        ) from error


def _counting_from_0(model: nn.Module) -> nn.Module:
    """Let positions that follow the padding's id begin at 0, where there is no such id.

    RoBERTa's kin number the tokens that are no padding from `padding_idx + 1` on; −1 is no token.
    """
    for module in model.modules():
        if hasattr(module, "position_embeddings") and getattr(module, "padding_idx", 0) is None:
            setattr(module, "padding_idx", -1)  # noqa: B010 (a buffer or a module by its type)
    return model


def _unknown(library: str, what: str, name: str, known: Any) -> UserError:
    remedy = hint(name, known, f"see {library}'s documentation")
    return UserError(f"{library} has no {what} {name!r}; {remedy}")


def mixer(
    in_channels: int, image_size: int, num_classes: int, *, patch_size: int, **options: Any
) -> nn.Module:
    """Build timm's MLP-Mixer with a head that is not zero.

    timm starts the head's weight at zero, which makes every other block of the Hessian exactly
    zero at initialisation. Here it starts at the truncated N(0, 0.02²) of timm's own ViT.

    Args:
        in_channels: Channels of the images.
        image_size: Their side.
        num_classes: Number of classes.
        patch_size: Side of a patch.
        options: num_blocks, embed_dim, mlp_ratio and the like of `timm`'s `MlpMixer`.
    """
    from timm.models.mlp_mixer import MlpMixer

    model = MlpMixer(
        num_classes=num_classes,
        img_size=image_size,
        in_chans=in_channels,
        patch_size=patch_size,
        **options,
    )
    nn.init.trunc_normal_(model.get_parameter("head.weight"), std=0.02)
    return model


def llama(vocab_size: int, context: int, **options: Any) -> nn.Module:
    """Build a LLaMA-like language model (Touvron et al. 2023) from options of `LlamaConfig`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size, max_position_embeddings=context, use_cache=False, **_NO_IDS | options
    )
    return LlamaForCausalLM(config)


def mamba(vocab_size: int, **options: Any) -> nn.Module:
    """Build a Mamba language model (Gu & Dao 2023) from options of `MambaConfig`.

    transformers' own, but for the mixers' forward pass, which gives the same. Its reference path
    slices the whole sequence at every step, and the derivative of a slice is as large as the
    sequence: at 32 characters a product takes three times as long. The kernels of mamba_ssm, which
    it takes where they are installed, have no second derivative.
    """
    from transformers import MambaConfig, MambaForCausalLM
    from transformers.models.mamba.modeling_mamba import MambaMixer

    class Mixer(MambaMixer):
        def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:  # (B, T, C) -> (B, T, C)
            T, N = hidden.shape[1], self.ssm_state_size
            x, gate = self.in_proj(hidden).chunk(2, dim=-1)
            x = self.act(self.conv1d(x.mT)[..., :T]).mT
            dt, B, C = self.x_proj(x).split([self.time_step_rank, N, N], dim=-1)
            dt = softplus(self.dt_proj(dt))
            decay = torch.exp(-torch.exp(self.A_log) * dt[..., None])  # (B, T, D, N)
            drive = (dt * x)[..., None] * B[:, :, None]  # (B, T, D, N)
            state, read = torch.zeros_like(drive[:, 0]), []
            for a, b, c in zip(decay.unbind(1), drive.unbind(1), C.unbind(1), strict=True):
                state = a * state + b
                read.append((state @ c[..., None])[..., 0])
            y = torch.stack(read, 1) + self.D * x
            return self.out_proj(y * silu(gate))

    config = MambaConfig(vocab_size=vocab_size, use_cache=False, **_NO_IDS | options)
    model = MambaForCausalLM(config)
    for index, layer in enumerate(model.backbone.layers):
        mixer = Mixer(config, index)
        mixer.load_state_dict(layer.get_submodule("mixer").state_dict())
        layer.register_module("mixer", mixer)
    return model


def bert(vocab_size: int, context: int, **options: Any) -> nn.Module:
    """Build a BERT masked language model (Devlin et al. 2019) from options of `BertConfig`.

    Without dropout, and with one token type: the tasks have no second sentence.
    """
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=vocab_size,
        max_position_embeddings=context,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **_NO_IDS | options,
    )
    return BertForMaskedLM(config)


def gpt2(vocab_size: int, context: int, **options: Any) -> nn.Module:
    """Build GPT-2 (Radford et al. 2019) with biases, as published, from options of `GPT2Config`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=context,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        **_NO_IDS | options,
    )
    return GPT2LMHeadModel(config)


# The defaults of the special tokens lie outside a vocabulary of characters.
_NO_IDS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
