"""Small convolutional networks: plain, VGG-like and residual."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def cnn(
    in_channels: int,
    num_classes: int,
    *,
    widths: Sequence[int],
    convs_per_stage: int = 1,
    batch_norm: bool = False,
) -> nn.Sequential:
    """Build a plain or VGG-like network (Simonyan & Zisserman 2015).

    Each stage has 3×3 convolutions of its width with ReLU, then halves the image by max-pooling;
    after the last one the image is averaged for the linear head.
    """
    layers: list[nn.Module] = []
    for i, width in enumerate(widths):
        for _ in range(convs_per_stage):
            layers.append(nn.Conv2d(in_channels, width, 3, padding=1, bias=not batch_norm))
            layers += [nn.BatchNorm2d(width)] if batch_norm else []
            layers.append(nn.ReLU())
            in_channels = width
        if i < len(widths) - 1:
            layers.append(nn.MaxPool2d(2))
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, num_classes)]
    return nn.Sequential(*layers)


class Residual(nn.Module):
    """Two 3×3 convolutions with a shortcut, a 1×1 convolution where the shape changes."""

    def __init__(self, in_width: int, width: int, stride: int, *, batch_norm: bool) -> None:
        super().__init__()

        def norm() -> nn.Module:
            return nn.BatchNorm2d(width) if batch_norm else nn.Identity()

        self.conv1 = nn.Conv2d(in_width, width, 3, stride, padding=1, bias=not batch_norm)
        self.norm1 = norm()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=not batch_norm)
        self.norm2 = norm()
        same = stride == 1 and in_width == width
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_width, width, 1, stride, bias=False)
        # Without norms the sum of branch and shortcut would grow with depth.
        self.scale = 1.0 if batch_norm else 0.5**0.5

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x)).relu()
        return ((self.norm2(self.conv2(y)) + self.shortcut(x)) * self.scale).relu()


class ResNet(nn.Module):
    """A residual network for small images (He et al. 2016, section 4.2).

    Args:
        in_channels: Channels of the image.
        num_classes: Number of classes.
        widths: Width of each stage; all but the first halve the image.
        blocks_per_stage: Residual blocks of each stage (1 with three widths is ResNet-8).
        batch_norm: With batch norms, or none at all.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        widths: Sequence[int] = (16, 32, 64),
        blocks_per_stage: int = 1,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        width = widths[0]
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=not batch_norm)
        self.norm = nn.BatchNorm2d(width) if batch_norm else nn.Identity()
        layers = []
        for i, new_width in enumerate(widths):
            for j in range(blocks_per_stage):
                stride = 2 if i > 0 and j == 0 else 1
                layers.append(Residual(width, new_width, stride, batch_norm=batch_norm))
                width = new_width
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.norm(self.stem(x)).relu())
        return self.head(x.mean((2, 3)))
