"""Convolutional networks: plain, VGG-like, residual and ConvNeXt, with and without norms."""

from __future__ import annotations

from typing import Any

from harness.registry.entry import ModelEntry, Recipe
from harness.registry.recipes import CIFAR10, DEMO, MNIST, OWN, SMALL, TIMM

_NETWORKS = "harness.registry.networks.convolutional"
_CNN: dict[str, Any] = {
    "factory": f"{_NETWORKS}:cnn",
    "reference": "Simonyan & Zisserman 2015, arXiv 1409.1556",
    **OWN,
}
_VGG: dict[str, Any] = {"family": "vgg", **_CNN, **SMALL}
_RESNET: dict[str, Any] = {
    "family": "resnet",
    "factory": f"{_NETWORKS}:ResNet",
    "reference": "He et al. 2016, arXiv 1512.03385, section 4.2",
    **OWN,
    **SMALL,
}
_CONVNEXT: dict[str, Any] = {
    "family": "convnext",
    "factory": "timm.models.convnext:ConvNeXt",
    "reference": "Liu et al. 2022, arXiv 2201.03545",
    **TIMM,
    **SMALL,
    **CIFAR10,
}
_FIVE_BLOCKS: dict[str, Any] = {
    "in_chans": 3,
    "patch_size": 2,
    "depths": (1, 1, 2, 1),
    "dims": (24, 32, 64, 96),
    "kernel_sizes": 3,
}

ENTRIES = (
    ModelEntry(
        name="cnn-digits",
        family="cnn",
        options={"widths": (16, 32, 32)},
        task="digits",
        hessian_batch_size=256,
        recipe=Recipe(
            num_steps=150,
            batch_size=64,
            sgd_lrs=(1e-2, 1.0),
            adamw_lrs=(1e-3, 1e-1),
            warmup_steps=10,
            eval_size=1024,
        ),
        description="Three 3×3 convolutions with ReLU on 8×8 digits",
        **_CNN,
        **DEMO,
    ),
    ModelEntry(
        name="vgg7-cifar10",
        options={"widths": (16, 32, 64), "convs_per_stage": 2},
        description="Six 3×3 convolutions with ReLU, no norms",
        **_VGG,
        **CIFAR10,
    ),
    ModelEntry(
        name="vgg7-bn-cifar10",
        options={"widths": (16, 32, 64), "convs_per_stage": 2, "batch_norm": True},
        description="Six 3×3 convolutions with BatchNorm and ReLU",
        **_VGG,
        **CIFAR10,
    ),
    ModelEntry(
        name="vgg4-mnist",
        options={"widths": (16, 32, 64)},
        description="Three 3×3 convolutions with ReLU, no norms",
        **_VGG,
        **MNIST,
    ),
    ModelEntry(
        name="resnet8-cifar10",
        options={"widths": (16, 32, 64)},
        description="Three residual blocks with BatchNorm",
        **_RESNET,
        **CIFAR10,
    ),
    ModelEntry(
        name="resnet8-nonorm-cifar10",
        options={"widths": (16, 32, 64), "batch_norm": False},
        description="Three residual blocks without norms, each sum scaled by √½",
        **_RESNET,
        **CIFAR10,
    ),
    ModelEntry(
        name="resnet14-mnist",
        options={"widths": (8, 16, 32), "blocks_per_stage": 2},
        description="Six narrow residual blocks with BatchNorm",
        **_RESNET,
        **MNIST,
    ),
    ModelEntry(
        name="convnext-cifar10",
        options={**_FIVE_BLOCKS, "ls_init_value": None},
        description="Five ConvNeXt blocks in four stages, 3×3 kernels, no layer scale",
        **_CONVNEXT,
    ),
    ModelEntry(
        name="convnext-layerscale-cifar10",
        options={**_FIVE_BLOCKS, "ls_init_value": 1e-6},
        description="The same with the published layer scale, which starts at 1e-6",
        **_CONVNEXT,
    ),
)
