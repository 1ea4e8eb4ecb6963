"""The systems of Zhang et al. 2024 (arXiv 2402.16788), but for the perceptrons, which are in `mlp`.

Architectures and data are the real ones; the batches of the Hessian are what two cores can do, and
are recorded with every row: 16 images, or at least 2,048 tokens. Of ResNet-18 and nanoGPT
the metrics that need few products are taken on four times as many samples. `harness run` takes
initial spectra only. The recipes are the paper's budgets with two departures: our schedule (cosine)
for all, and for language no weight decay, which 0.1 would make another function for SGD than for
AdamW.

Partition `paper` keeps the layers that the paper names. The authors' code
(github.com/zyushun/hessian-spectrum) lists the weights of these layers without biases, and for the
ViT names `blocks.6`, the seventh layer, where the paper's text says the sixth: we take the text.
Where the paper has all layers, VGG-16's and BERT's biases are left out too: most have at most 1,000
parameters and would be exact, at 5,000 and 8,000 products more than all the weights take.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from harness.registry.entry import ModelEntry, Recipe
from harness.registry.recipes import OWN, TIMM, TORCHVISION, TRANSFORMERS

_PAPER = "Zhang et al. 2024, arXiv 2402.16788"
_GPT = "harness.registry.networks.transformer:GPT"
_GPT2 = f"Radford et al. 2019, Language Models are Unsupervised Multitask Learners; {_PAPER}"

# 90 epochs of 1,281,167 images, 5,004 batches of 256 each.
_IMAGENET_RECIPE = Recipe(
    num_steps=90 * 5004,
    batch_size=256,
    sgd_lrs=(1e-2, 1.0),
    adamw_lrs=(1e-4, 1e-2),
    weight_decay=1e-4,
    warmup_steps=5 * 5004,
)
# 491,520 tokens a step; the authors' configuration of nanoGPT.
_GPT2_RECIPE = Recipe(
    num_steps=100_000,
    batch_size=960,
    sgd_lrs=(1e-2, 1.0),
    adamw_lrs=(6e-5, 6e-3),
    adamw_betas=(0.9, 0.95),
    clip=1.0,
    warmup_steps=2000,
    eval_size=128,
)
# The low end of 30 to 40 steps: blocks this large need fewer than small ones (docs/accuracy.md).
# Those with 10 have them for four times the samples; what that costs is in docs/dataset.md.
_PAPER_TIER: dict[str, Any] = {"tier": "paper", "num_steps": 30}
_IMAGENET: dict[str, Any] = {
    **_PAPER_TIER,
    "task": "imagenet",
    "hessian_batch_size": 16,
    "num_steps": 10,
    "recipe": _IMAGENET_RECIPE,
}
_GPT2_124M: dict[str, Any] = {
    **_PAPER_TIER,
    "family": "gpt",
    "factory": _GPT,
    "options": {"context": 1024, "num_layers": 12, "num_heads": 12, "width": 768},
    # Sequences of 512 of GPT-2's 1,024 positions: half the cost of a whole context.
    "task_options": {"tokenizer": "gpt2", "context": 512},
    "hessian_batch_size": 4,
    "num_steps": 10,
    "paper_blocks": ("wte.weight", "h.0.*", "h.3.*", "h.7.*", "h.11.*"),
    "recipe": _GPT2_RECIPE,
    "reference": _GPT2,
    **OWN,
}

ENTRIES = (
    ModelEntry(
        name="resnet18-imagenet",
        family="resnet",
        factory="torchvision.models:resnet18",
        reference=f"He et al. 2016, arXiv 1512.03385; {_PAPER}",
        description="ResNet-18 on ImageNet",
        **TORCHVISION,
        **_IMAGENET | {"num_steps": 30, "moments_batch_size": 64},
    ),
    ModelEntry(
        name="vgg16-imagenet",
        family="vgg",
        factory="torchvision.models:vgg16",
        paper_blocks=("*.weight",),
        reference=f"Simonyan & Zisserman 2015, arXiv 1409.1556; {_PAPER}",
        description="VGG-16 without norms on ImageNet",
        **TORCHVISION,
        **_IMAGENET,
    ),
    ModelEntry(
        name="vit-base-imagenet",
        family="vit",
        factory="timm:create_model",
        options={"model_name": "vit_base_patch16_224", "num_classes": 1000},
        paper_blocks=(
            "patch_embed.proj.weight",
            *(f"blocks.{i}.*.weight*" for i in (0, 5, 11)),
            "head.weight",
        ),
        reference=f"Dosovitskiy et al. 2021, arXiv 2010.11929; {_PAPER}",
        description="ViT-B/16 on ImageNet",
        **TIMM,
        **_IMAGENET,
    ),
    ModelEntry(
        name="mixer-imagenet",
        family="mixer",
        factory="harness.registry.networks.libraries:mixer",
        options={"patch_size": 16, "num_blocks": 12, "embed_dim": 768},
        paper_blocks=(
            "stem.proj.weight",
            *(f"blocks.{i}.*.weight" for i in (0, 5, 11)),
            "head.weight",
        ),
        reference=f"Tolstikhin et al. 2021, arXiv 2105.01601; {_PAPER}",
        description="timm's mixer_b16_224 on ImageNet, its zero head at N(0, 0.02²) instead",
        **TIMM,
        **_IMAGENET,
    ),
    ModelEntry(
        name="bert-cornell",
        family="bert",
        factory="harness.registry.networks.libraries:bert",
        options={
            "hidden_size": 768,
            "num_hidden_layers": 2,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
        },
        task="cornell",
        task_options={"context": 64, "vocab_size": 30_522},
        hessian_batch_size=32,
        paper_blocks=("*.weight",),
        recipe=replace(_GPT2_RECIPE, num_steps=20_000, batch_size=32, eval_size=1024),
        reference=f"Devlin et al. 2019, arXiv 1810.04805; {_PAPER}",
        description="BERT of two layers of width 768 on films' dialogue, by words for WordPiece",
        **TRANSFORMERS,
        **_PAPER_TIER | {"num_steps": 10},
    ),
    ModelEntry(
        name="gpt2-nano-shakespeare",
        family="gpt",
        factory=_GPT,
        options={"num_layers": 6, "num_heads": 6, "width": 384, "dropout": 0.2},
        task="tiny-shakespeare",
        task_options={"context": 256},
        hessian_batch_size=16,
        moments_batch_size=64,
        recipe=Recipe(
            num_steps=5000,
            batch_size=64,
            sgd_lrs=(1e-2, 1.0),
            adamw_lrs=(1e-4, 1e-2),
            adamw_betas=(0.9, 0.99),
            clip=1.0,
            warmup_steps=100,
            eval_size=256,
        ),
        reference=f"nanoGPT, config/train_shakespeare_char.py; {_PAPER}",
        description="nanoGPT's character model, 10.7 M parameters",
        **OWN,
        **_PAPER_TIER,
    ),
    ModelEntry(
        name="gpt2-openwebtext",
        task="openwebtext",
        status="pending",
        reason="OpenWebText is only on the Hub, out of reach here; "
        "stand-ins: gpt2-wikitext, gpt2-books",
        description="GPT-2 (124 M, no biases, tied) on OpenWebText",
        **_GPT2_124M,
    ),
    ModelEntry(
        name="gpt2-wikitext",
        task="wikitext",
        description="GPT-2 (124 M, no biases, tied) on WikiText-2; stands in for gpt2-openwebtext",
        **_GPT2_124M,
    ),
    ModelEntry(
        name="gpt2-books",
        task="books",
        description="GPT-2 (124 M, no biases, tied) on books; stands in for gpt2-openwebtext",
        **_GPT2_124M,
    ),
    ModelEntry(
        name="gpt2-sft",
        family="gpt",
        factory="harness.registry.networks.libraries:gpt2",
        options={"context": 1024},
        task="sft",
        task_options={"corpus": "alpaca", "tokenizer": "gpt2", "context": 512},
        hessian_batch_size=1,
        moments_batch_size=4,
        recipe=replace(_GPT2_RECIPE, num_steps=1000, batch_size=128, warmup_steps=50),
        paper_blocks=(
            "transformer.wte.weight",
            *(f"transformer.h.{i}.*.weight*" for i in (0, 3, 7, 11)),
        ),
        status="pending",
        reason="GPT-2's pretrained weights are only on the Hub, out of reach here; "
        "stand-in: gpt-nano-sft",
        reference=_GPT2,
        description="GPT-2 from its pretrained weights, fine-tuned on instructions",
        **TRANSFORMERS,
        **_PAPER_TIER,
    ),
)
