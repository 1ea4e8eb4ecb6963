"""Networks of libraries, built from plain options and without pretrained weights."""

from __future__ import annotations

from typing import Any

from torch import nn


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

    Where mamba_ssm is not installed transformers takes its reference path in plain torch, the one
    that has second derivatives.
    """
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(
        MambaConfig(vocab_size=vocab_size, use_cache=False, **_NO_IDS | options)
    )


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
