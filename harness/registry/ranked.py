"""The entries of protocol 2: those that the leaderboard ranks, and the references beside them.

A run of T steps takes about a minute of one core: small networks on the low-noise side, 256 images
or 4,096 tokens a step. Their spectra and predictors are taken at initialisation on 512 images or
8,192 tokens. docs/protocol.md, Protocol 2, says how entries and pairs were chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from harness.registry.entry import ModelEntry, SpeedupRecipe
from harness.registry.recipes import OWN, TIMM, TRANSFORMERS

_NETWORKS = "harness.registry.networks"
_RESNET = "He et al. 2016, arXiv 1512.03385, section 4.2"
_VIT = "Dosovitskiy et al. 2021, arXiv 2010.11929"
_BARCODES = "Kunstner et al. 2024, arXiv 2402.19449"

_IMAGES = SpeedupRecipe(num_steps=800, batch_size=256, sgd_lr=0.1, adamw_lr=3e-3)
_TEXT = SpeedupRecipe(
    num_steps=600,
    batch_size=64,
    sgd_lr=1.0,
    adamw_lr=1e-2,
    adamw_betas=(0.9, 0.95),
    clip=1.0,
    eval_size=512,
)

# Continued, 20 steps leave 1 to 3 % of error in JS⁰ (docs/accuracy.md, Rules that are continued).
_TIER: dict[str, Any] = {"tier": "ranked", "num_steps": 20, **OWN}

_CIFAR: dict[str, Any] = {
    "task": "cifar10",
    "task_options": {"train_size": 20_000},
    "hessian_batch_size": 512,
    "microbatch_size": 128,
    "speedup": _IMAGES,
    **_TIER,
}
# Half of the 20,000 images are of ten classes, half of 2,000 classes of five.
_CODES: dict[str, Any] = {
    "task": "mnist-barcodes",
    "task_options": {"train_size": 10_000, "test_size": 0, "rare_classes": 2_000},
}
# The novels; the Bible is left for the pretraining of another entry.
_NOVELS = ("war_and_peace", "pride_and_prejudice")
_BPE: dict[str, Any] = {
    "task": "books",
    "task_options": {"titles": _NOVELS, "tokenizer": "bpe", "vocab_size": 2048},
    "hessian_batch_size": 128,
    "microbatch_size": 32,
    "speedup": _TEXT,
    **_TIER,
}
# GPT-2 starts at 0.02 at a width of 768: at 32 the same part of 1/√width is 0.02 √(768/32).
_INIT_STD = 0.098
_GPT: dict[str, Any] = {"num_layers": 2, "num_heads": 4, "width": 32, "init_std": _INIT_STD}

_RESNET8 = ModelEntry(
    name="cifar-resnet8",
    family="resnet",
    factory=f"{_NETWORKS}.convolutional:ResNet",
    options={"widths": (8, 16, 32)},
    reference=_RESNET,
    description="Three residual blocks of 8, 16 and 32 channels with BatchNorm",
    **_CIFAR,
)
_VISION = ModelEntry(
    name="cifar-vit",
    family="vit",
    factory=f"{_NETWORKS}.transformer:ViT",
    options={"patch_size": 8, "num_layers": 3, "num_heads": 4, "width": 48},
    reference=_VIT,
    description="Three pre-norm layers of width 48 on 8×8 patches",
    **_CIFAR,
)
_LANGUAGE = ModelEntry(
    name="bpe-gpt",
    family="gpt",
    factory=f"{_NETWORKS}.transformer:GPT",
    options=_GPT,
    reference="Radford et al. 2019, Language Models are Unsupervised Multitask Learners",
    description="Two layers of width 32 on BPE of 2,048 tokens, tied",
    **_BPE,
)
_WIDE = ModelEntry(
    name="bpe-llama",
    family="llama",
    factory=f"{_NETWORKS}.libraries:llama",
    options={
        "hidden_size": 32,
        "intermediate_size": 88,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "tie_word_embeddings": True,
        "initializer_range": _INIT_STD,
    },
    reference="Touvron et al. 2023, arXiv 2302.13971",
    description="Two layers of width 32 on BPE of 2,048 tokens, tied",
    **_BPE | TRANSFORMERS,
)

_RANKED = (
    _RESNET8,
    replace(
        _RESNET8,
        name="cifar-resnet8-nonorm",
        options={"widths": (8, 16, 32), "batch_norm": False},
        description="The same without norms, each sum scaled by √½",
    ),
    ModelEntry(
        name="cifar-vgg7",
        family="vgg",
        factory=f"{_NETWORKS}.convolutional:cnn",
        options={"widths": (8, 16, 32), "convs_per_stage": 2, "batch_norm": True},
        reference="Simonyan & Zisserman 2015, arXiv 1409.1556",
        description="Six 3×3 convolutions of 8, 16 and 32 channels with BatchNorm",
        **_CIFAR,
    ),
    ModelEntry(
        name="cifar-convnext",
        family="convnext",
        factory="timm.models.convnext:ConvNeXt",
        options={
            "in_chans": 3,
            "patch_size": 4,
            "depths": (1, 1, 1, 1),
            "dims": (16, 24, 32, 48),
            "kernel_sizes": 3,
            "ls_init_value": None,
        },
        reference="Liu et al. 2022, arXiv 2201.03545",
        description="Four ConvNeXt blocks in four stages, 3×3 kernels, no layer scale",
        **_CIFAR | TIMM,
    ),
    _VISION,
    replace(
        _VISION,
        name="cifar-vit-postnorm",
        options={**_VISION.options, "pre_norm": False},
        reference=f"{_VIT}; norms as in Vaswani et al. 2017, arXiv 1706.03762",
        description="The same with the norms after the sums",
    ),
    ModelEntry(
        name="cifar-mixer",
        family="mixer",
        factory=f"{_NETWORKS}.libraries:mixer",
        options={"patch_size": 8, "num_blocks": 3, "embed_dim": 48, "mlp_ratio": (0.5, 4.0)},
        reference="Tolstikhin et al. 2021, arXiv 2105.01601",
        description="Three layers of width 48 on 8×8 patches, with a head that is not zero",
        **_CIFAR | TIMM,
    ),
    ModelEntry(
        name="cifar-mlp",
        family="mlp",
        factory=f"{_NETWORKS}.mlp:MLP",
        options={"widths": (128, 128, 128, 128, 128)},
        reference="Rumelhart, Hinton & Williams 1986, Nature 323, 533-536",
        description="Five hidden layers of 128",
        **_CIFAR,
    ),
    replace(
        _RESNET8,
        name="barcodes-resnet8",
        **_CODES,
        reference=f"{_RESNET}; data: {_BARCODES}",
        description="Three residual blocks with BatchNorm on ten balanced and many rare classes",
    ),
    replace(
        _VISION,
        name="barcodes-vit",
        options={**_VISION.options, "patch_size": 7},
        **_CODES,
        reference=f"{_VIT}; data: {_BARCODES}",
        description="Three pre-norm layers on ten balanced and many rare classes",
    ),
    replace(
        _LANGUAGE,
        name="char-gpt",
        task_options={"titles": _NOVELS},
        description="Two layers of width 32 on characters, tied",
    ),
    _LANGUAGE,
    replace(
        _LANGUAGE,
        name="bpe-gpt-untied",
        options={**_GPT, "tied": False},
        description="Two layers of width 32 on BPE of 2,048 tokens, embedding and head apart",
    ),
    replace(
        _LANGUAGE,
        name="bpe-gpt-tuned",
        pretrained="bible-gpt",
        description="bible-gpt, trained on with the novels",
    ),
    _WIDE,
    ModelEntry(
        name="bpe-mamba",
        family="mamba",
        factory=f"{_NETWORKS}.libraries:mamba",
        options={"hidden_size": 32, "state_size": 4, "num_hidden_layers": 1},
        reference="Gu & Dao 2023, arXiv 2312.00752",
        description="One layer of width 32 with states of size 4, tied",
        **_BPE | TRANSFORMERS,
    ),
    ModelEntry(
        name="bpe-lstm",
        family="lstm",
        factory=f"{_NETWORKS}.recurrent:LSTM",
        options={"width": 32, "num_layers": 1},
        reference="Hochreiter & Schmidhuber 1997, Neural Computation 9, 1735-1780",
        description="One layer of width 32, embedding and head apart",
        **_BPE,
    ),
    ModelEntry(
        name="bpe-bert",
        family="bert",
        factory=f"{_NETWORKS}.libraries:bert",
        options={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "initializer_range": _INIT_STD,
        },
        reference="Devlin et al. 2019, arXiv 1810.04805",
        description="Two layers of width 32 on BPE of 2,048 tokens, masked, tied",
        **_BPE | TRANSFORMERS | {"task": "masked-books", "task_options": {"titles": _NOVELS}},
    ),
)


def _varied(
    suffix: str, difference: str, vary: Callable[[SpeedupRecipe], SpeedupRecipe]
) -> Iterator[ModelEntry]:
    """Yield references: some of the ranked entries, with another recipe."""
    for entry in (_RESNET8, _VISION, _LANGUAGE, _WIDE):
        assert entry.speedup is not None
        yield replace(
            entry,
            name=f"{entry.name}-{suffix}",
            tier="reference",
            speedup=vary(entry.speedup),
            description=f"{entry.name} with {difference}",
        )


def _softmax(frequencies: str) -> ModelEntry:
    """Return softmax regression on classes of such frequencies."""
    return ModelEntry(
        name=f"softmax-{frequencies}",
        family="softmax",
        tier="reference",
        factory=f"{_NETWORKS}.mlp:Softmax",
        task="gaussian-classes",
        task_options={"frequencies": frequencies},
        hessian_batch_size=2048,
        # All samples at each step, few steps: it is convex.
        speedup=replace(_IMAGES, num_steps=100, batch_size=2048),
        reference=_BARCODES,
        description=f"Softmax regression on Gaussian inputs, classes {frequencies}",
        **OWN,
    )


_REFERENCES = (
    replace(
        _LANGUAGE,
        name="bible-gpt",
        tier="reference",
        task_options={**_LANGUAGE.task_options, "titles": ("kjv_bible",)},
        stages=("init", "final"),
        description="bpe-gpt on the Bible; the pretraining of bpe-gpt-tuned",
    ),
    _softmax("balanced"),
    _softmax("zipf"),
    *_varied(
        "small-batch",
        "an eighth of the batch and eight times the steps",
        lambda recipe: replace(
            recipe, num_steps=8 * recipe.num_steps, batch_size=recipe.batch_size // 8
        ),
    ),
    *_varied(
        "momentum98",
        "a momentum of 0.98 in both optimizers",
        lambda recipe: replace(recipe, momentum=0.98, adamw_betas=(0.98, recipe.adamw_betas[1])),
    ),
)

ENTRIES = _RANKED + _REFERENCES

# Entries that differ in one factor: the factor, and the two.
PAIRS = (
    ("characters or BPE", "char-gpt", "bpe-gpt"),
    ("pre-norm or post-norm", "cifar-vit", "cifar-vit-postnorm"),
    ("norm or none", "cifar-resnet8", "cifar-resnet8-nonorm"),
    ("tied or untied", "bpe-gpt", "bpe-gpt-untied"),
    ("scratch or pretrained", "bpe-gpt", "bpe-gpt-tuned"),
    ("balanced or barcodes, resnet", "cifar-resnet8", "barcodes-resnet8"),
    ("balanced or barcodes, vit", "cifar-vit", "barcodes-vit"),
    ("vit or resnet", "cifar-vit", "cifar-resnet8"),
    ("gpt or lstm", "bpe-gpt-untied", "bpe-lstm"),
    ("gpt or mamba", "bpe-gpt", "bpe-mamba"),
    ("gpt or llama", "bpe-gpt", "bpe-llama"),
    ("gpt or bert", "bpe-gpt", "bpe-bert"),
    ("mixer or mlp", "cifar-mixer", "cifar-mlp"),
    ("vit or mixer", "cifar-vit", "cifar-mixer"),
    ("convnext or vgg", "cifar-convnext", "cifar-vgg7"),
    ("resnet or vgg", "cifar-resnet8", "cifar-vgg7"),
)

# What the protocol must say of each before anything is ranked: whether Adam is needed.
GATE = {
    "cifar-resnet8": "no",
    "bpe-gpt": "yes",
    "cifar-vit": "yes",
    "softmax-balanced": "no",
    "softmax-zipf": "yes",
}
_TEXTS = ("books", "masked-books")


def modality(entry: ModelEntry) -> str:
    """Tell whether an entry learns images or text."""
    return "text" if entry.task in _TEXTS else "images"
