"""Image classification: digits, MNIST, CIFAR-10, ImageNet."""

from __future__ import annotations

import io
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from harness.tasks import sources
from harness.tasks.base import Batch, Classification, Data, check_sizes


@dataclass(frozen=True)
class ImageTask(Classification):
    """Classify images; a batch is (images (B, C, H, W) float32, labels (B,) int64).

    Images are kept as bytes and normalised per channel when they are drawn:
    x = (pixel / max_pixel - mean) / std.

    Attributes:
        train_size: keep the first so many training images; None keeps all.
        test_size: keep the first so many test images; None keeps all.
        image_size: resize the images to squares of this side (bilinear, antialiased); None leaves
            them as they are.
    """

    train_size: int | None = None
    test_size: int | None = None
    image_size: int | None = None

    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]
    max_pixel: ClassVar[int] = 255

    def __post_init__(self) -> None:
        check_sizes(self, train_size=1, test_size=0, image_size=1)

    def take(self, data: Data, split: str, indices: Tensor, generator: torch.Generator) -> Batch:
        """Gather, normalise, resize; nothing here is random."""
        pixels, labels = super().take(data, split, indices, generator)
        shift = torch.tensor(self.mean).view(-1, 1, 1) * self.max_pixel
        scale = 1 / (torch.tensor(self.std).view(-1, 1, 1) * self.max_pixel)
        images = pixels.float().sub_(shift).mul_(scale)
        if self.image_size is not None:
            images = functional.interpolate(
                images, size=[self.image_size] * 2, mode="bilinear", antialias=True
            )
        return images, labels

    def _data(self, train: Batch, test: Batch, source: str, checksum: str, classes: int) -> Data:
        side = self.image_size or train[0].shape[-1]
        size = {"image_size": side, "in_channels": train[0].shape[1]}
        return Data(train, test, source, checksum, {"num_classes": classes, **size})


@dataclass(frozen=True)
class Digits(ImageTask):
    """Hold scikit-learn's digits: 1,797 real 8x8 grey images, embedded in that package.

    The images come writer by writer, so they are shuffled (seed 0) before the last fifth, 360
    images, becomes the test split. Mean and std are those of the training split, in units of the
    largest pixel, 16.
    """

    name: ClassVar[str] = "digits"
    extent: ClassVar[str] = "1,437 + 360 of 8 × 8, embedded"
    mean: ClassVar[tuple[float, ...]] = (0.3049,)
    std: ClassVar[tuple[float, ...]] = (0.3758,)
    max_pixel: ClassVar[int] = 16

    def read(self, root: Path | None) -> Data:
        """Read the images that ship with scikit-learn; no root is needed."""
        import sklearn
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        pixels = images.astype(np.uint8).reshape(-1, 1, 8, 8)
        checksum = sources.sha256([pixels.tobytes(), labels.astype(np.int64).tobytes()])
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
        x, y = torch.from_numpy(pixels)[order], torch.from_numpy(labels.astype(np.int64))[order]
        train = tuple(t[:-360][: self.train_size] for t in (x, y))
        test = tuple(t[-360:][: self.test_size] for t in (x, y))
        source = f"scikit-learn {sklearn.__version__} load_digits"
        return self._data(train, test, source, checksum, 10)


@dataclass(frozen=True)
class ParquetImages(ImageTask):
    """Read `train.parquet` and `test.parquet` of encoded images, or the same from the Hub."""

    folder: ClassVar[str]
    splits: ClassVar[tuple[str, ...]] = ("train", "test")
    repo: ClassVar[str]
    columns: ClassVar[tuple[str, str]] = ("image", "label")  # their names on the Hub
    num_classes: ClassVar[int] = 10

    @abstractmethod
    def pixels(self, image: Any) -> np.ndarray:
        """Convert a Pillow image to bytes (C, H, W)."""

    def read(self, root: Path | None) -> Data:
        """Decode as many images as are asked for, from the data root or the Hub."""
        sizes = {"train": self.train_size, "test": self.test_size}
        paths = [f"{self.folder}/{split}.parquet" for split in self.splits]
        if files := sources.find(root, *paths):
            source, checksum = sources.file_source(files)
            parts = [
                self._decode(file, sizes[split])
                for split, file in zip(self.splits, files, strict=True)
            ]
        else:
            parts, source = sources.from_hub(
                self.name, root, paths, self.repo, lambda load: self._hub(load, sizes)
            )
            checksum = sources.sha256(t.numpy().tobytes() for part in parts for t in part)
        parts = [
            tuple(tensor[: sizes[split]] for tensor in part)
            for split, part in zip(self.splits, parts, strict=True)
        ]
        train = parts[0]
        test = parts[1] if len(parts) > 1 else tuple(t[:0] for t in train)
        return self._data(train, test, source, checksum, self.num_classes)

    def _decode(self, file: Path, size: int | None) -> Batch:
        import pyarrow.parquet as pq
        from PIL import Image

        table = pq.read_table(file, columns=["image", "label"])
        table = table if size is None else table.slice(0, max(1, size))  # one tells the shape
        encoded = [io.BytesIO(image["bytes"]) for image in table["image"].to_pylist()]
        images = np.stack([self.pixels(Image.open(image)) for image in encoded])
        return torch.from_numpy(images), torch.tensor(table["label"].to_pylist())

    def _hub(self, load: Callable[..., Any], sizes: dict[str, int | None]) -> list[Batch]:
        parts: list[Batch] = []
        for split in self.splits:
            rows = load(split=split, streaming=True)
            if (size := sizes[split]) is not None:
                rows = rows.take(max(1, size))  # one tells the shape
            image, label = self.columns
            images, labels = zip(
                *((self.pixels(row[image]), row[label]) for row in rows), strict=True
            )
            parts.append((torch.from_numpy(np.stack(images)), torch.tensor(labels)))
        return parts


@dataclass(frozen=True)
class Mnist(ParquetImages):
    """Read MNIST: 60,000 + 10,000 grey images of 28x28, normalised by its known mean and std."""

    name: ClassVar[str] = "mnist"
    extent: ClassVar[str] = "60,000 + 10,000 of 28 × 28"
    folder: ClassVar[str] = "mnist"
    repo: ClassVar[str] = "ylecun/mnist"
    mean: ClassVar[tuple[float, ...]] = (0.1307,)
    std: ClassVar[tuple[float, ...]] = (0.3081,)

    def pixels(self, image: Any) -> np.ndarray:
        """Return (1, 28, 28)."""
        return np.asarray(image.convert("L"), dtype=np.uint8)[None]


@dataclass(frozen=True)
class Cifar10(ParquetImages):
    """Read CIFAR-10: 50,000 + 10,000 RGB images of 32x32.

    The data pack interleaves the classes, so every prefix of a multiple of 10 images is balanced.
    Mean and std are those usual for the original files. The test split is 2,000 images unless
    asked otherwise: an evaluation then costs a second or less beside runs of 20 to 30 s, and its
    binomial error stays near 1 %.
    """

    test_size: int | None = 2_000

    name: ClassVar[str] = "cifar10"
    extent: ClassVar[str] = "50,000 + 10,000 of 3 × 32 × 32"
    folder: ClassVar[str] = "cifar10"
    repo: ClassVar[str] = "uoft-cs/cifar10"
    columns: ClassVar[tuple[str, str]] = ("img", "label")
    mean: ClassVar[tuple[float, ...]] = (0.4914, 0.4822, 0.4465)
    std: ClassVar[tuple[float, ...]] = (0.2470, 0.2435, 0.2616)

    def pixels(self, image: Any) -> np.ndarray:
        """Return (3, 32, 32)."""
        return np.asarray(image.convert("RGB"), dtype=np.uint8).transpose(2, 0, 1)


@dataclass(frozen=True)
class ImageNet(ParquetImages):
    """Read ImageNet (ILSVRC-2012) at 224x224: the sample of one image a class, or the Hub's.

    There is no test split (one image a class leaves nothing to hold out). Images of another size
    are resized to a short side of 256 and cropped at the centre, as usual for evaluation; mean and
    std are the usual ones of torchvision's weights. `train_size` bounds what is read of the Hub.
    """

    train_size: int | None = 1_000

    name: ClassVar[str] = "imagenet"
    extent: ClassVar[str] = "3 × 224 × 224; 1,000 classes"
    folder: ClassVar[str] = "imagenet1k_sample"
    splits: ClassVar[tuple[str, ...]] = ("train",)
    repo: ClassVar[str] = "ILSVRC/imagenet-1k"
    mean: ClassVar[tuple[float, ...]] = (0.485, 0.456, 0.406)
    std: ClassVar[tuple[float, ...]] = (0.229, 0.224, 0.225)
    num_classes: ClassVar[int] = 1_000

    def pixels(self, image: Any) -> np.ndarray:
        """Return (3, 224, 224)."""
        from PIL import Image

        image = image.convert("RGB")
        if image.size != (224, 224):
            ratio = 256 / min(image.size)
            width, height = (max(256, round(side * ratio)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
            left, top = (width - 224) // 2, (height - 224) // 2
            image = image.crop((left, top, left + 224, top + 224))
        return np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)
