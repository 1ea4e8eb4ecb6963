"""MNIST with barcodes: ten frequent classes and thousands of rare ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from harness.errors import UserError
from harness.tasks import sources
from harness.tasks.base import Batch, Data, check_sizes
from harness.tasks.images import Mnist

_BITS = 10
_DIGITS = 10


@dataclass(frozen=True)
class MnistBarcodes(Mnist):
    """Classify MNIST's digits beside rare classes, each a digit with a barcode in the corner.

    Rare class 10 + 10 c + d holds images of digit d whose first ten pixels of the top row are the
    bits of c, most significant first, white for one. Its images are drawn (seed 0, with
    replacement) from the training images of d that are kept, those of the test split, one a class,
    from its own. As in Kunstner et al. 2024 (arXiv 2402.19449, appendix A.2, and their code) the
    whole is 10,240 rare classes of 5 images, so that about half of the images are of ten frequent
    classes; and as there c = 0 leaves the image as it is, so that its ten classes can't be told
    from the digits. Unlike there the images are normalised by MNIST's mean and std, not pixel by
    pixel, and `train_size` counts the first images of MNIST's own 60,000, not 50,000 of them.

    Attributes:
        train_size, test_size: keep the first so many images of MNIST; the rare classes come on
            top. A test size of 0 leaves the split empty.
        rare_classes: how many classes with a barcode, at most 10,240.
        rare_images: training images of each.
    """

    train_size: int | None = 50_000
    rare_classes: int = _DIGITS * 2**_BITS
    rare_images: int = 5

    name: ClassVar[str] = "mnist-barcodes"
    extent: ClassVar[str] = "50,000 of MNIST and 51,200 of 10,240 rare classes, 28 × 28"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, rare_classes=1, rare_images=1)
        if self.rare_classes > (most := _DIGITS * 2**_BITS):
            raise UserError(
                f"task {self.name!r}: rare_classes is {self.rare_classes:,}; a barcode of {_BITS} "
                f"pixels has at most {most:,}"
            )

    def read(self, root: Path | None) -> Data:
        """Read MNIST and add the rare classes."""
        mnist = super().read(root)
        generator = torch.Generator().manual_seed(0)
        train = self._with_rare("training", mnist.train, self.rare_images, generator)
        test = mnist.test
        if len(test[0]):
            test = self._with_rare("test", test, 1, generator)
        source = (
            f"{mnist.source}, with {self.rare_classes:,} rare classes of {self.rare_images} images "
            "that have barcodes, drawn by seed 0"
        )
        checksum = sources.sha256(t.numpy().tobytes() for t in (*train, *test))
        return self._data(train, test, source, checksum, _DIGITS + self.rare_classes)

    def _with_rare(self, split: str, part: Batch, count: int, generator: torch.Generator) -> Batch:
        """Add `count` images of each rare class to a split."""
        images, labels = part
        rare = torch.arange(self.rare_classes).repeat_interleave(count)
        chosen = self._draw(split, labels, rare % _DIGITS, generator)
        coded = images[chosen]
        bits = (rare[:, None] // _DIGITS >> torch.arange(_BITS - 1, -1, -1)) & 1
        coded[:, 0, 0, :_BITS][bits.bool()] = self.max_pixel
        return torch.cat([images, coded]), torch.cat([labels, _DIGITS + rare])

    def _draw(
        self, split: str, labels: Tensor, digits: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Draw an image of each of these digits, by its number."""
        counts = labels.bincount(minlength=_DIGITS)
        if lacking := sorted(set(digits[counts[digits] == 0].tolist())):
            raise UserError(
                f"task {self.name!r}: the {len(labels)} {split} images that are kept have no digit "
                f"{', '.join(map(str, lacking))} to put a barcode on; keep more"
            )
        at = (torch.rand(len(digits), generator=generator) * counts[digits]).long()
        # The images by digit, each digit's from its first on.
        return labels.argsort(stable=True)[(counts.cumsum(0) - counts)[digits] + at]
