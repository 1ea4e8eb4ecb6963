from __future__ import annotations

from pathlib import Path

import pytest

from harness import tasks
from harness.errors import UserError

SIZES = {"train_size": 200, "test_size": 100, "rare_classes": 1_030, "rare_images": 3}


@pytest.fixture(scope="module")
def barcodes(data_root: Path):
    return tasks.get("mnist-barcodes", **SIZES).load(data_root)


@pytest.fixture(scope="module")
def plain(data_root: Path):
    return tasks.get("mnist", train_size=200, test_size=100).load(data_root)


def test_rare_classes_come_on_top_of_the_digits(barcodes, plain) -> None:
    assert barcodes.model_options == plain.model_options | {"num_classes": 1_040}
    for split, size, count in ("train", 200, 3), ("test", 100, 1):
        (images, labels), (digits, names) = barcodes.part(split), plain.part(split)
        assert images[:size].equal(digits)
        assert labels[:size].equal(names)
        assert labels[size:].bincount().tolist() == [0] * 10 + [count] * 1_030


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_rare_image_is_a_digit_of_its_split_with_the_code_of_its_class(
    barcodes, plain, split
) -> None:
    images, labels = barcodes.part(split)
    digits, names = plain.part(split)
    known = {
        (image.numpy().tobytes(), int(name)) for image, name in zip(digits, names, strict=True)
    }
    assert (digits[:, 0, 0, :10] == 0).all()  # else the code could not be taken off again
    for image, label in zip(images[len(digits) :], labels[len(digits) :] - 10, strict=True):
        row = image[0, 0, :10].tolist()
        assert set(row) <= {0, 255}
        assert int("".join("01"[pixel == 255] for pixel in row), 2) == label // 10
        bare = image.clone()
        bare[0, 0, :10] = 0
        assert (bare.numpy().tobytes(), int(label % 10)) in known


def test_barcodes_are_the_same_every_time(barcodes, data_root: Path) -> None:
    task = tasks.get("mnist-barcodes", **SIZES)
    again = task.read(data_root)
    assert again.checksum == barcodes.checksum
    assert all(a.equal(b) for a, b in zip(again.train, barcodes.train, strict=True))
    fewer = tasks.get("mnist-barcodes", **SIZES | {"rare_classes": 20}).load(data_root)
    assert fewer.checksum != barcodes.checksum
    assert "20 rare classes of 3 images" in fewer.source


def test_many_images_of_a_class_are_not_one_image(data_root: Path) -> None:
    sizes = {"train_size": 500, "test_size": 0, "rare_classes": 10, "rare_images": 200}
    task = tasks.get("mnist-barcodes", **sizes)
    images = task.load(data_root).train[0][500:]
    assert len(images.flatten(1).unique(dim=0)) > 300  # of 500; 490 expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rare_classes": 10_241}, "rare_classes is 10,241; .* at most 10,240"),
        ({"rare_images": 0}, "rare_images is 0"),
    ],
)
def test_classes_that_can_not_be_are_refused(options, message) -> None:
    with pytest.raises(UserError, match=message):
        tasks.get("mnist-barcodes", **options)


def test_a_digit_that_is_not_kept_can_have_no_barcode(data_root: Path) -> None:
    with pytest.raises(
        UserError, match=r"the 2 training images that are kept have no digit .*more"
    ):
        tasks.get("mnist-barcodes", train_size=2, test_size=0).load(data_root)
    empty = tasks.get("mnist-barcodes", train_size=200, test_size=0, rare_classes=5)
    assert len(empty.load(data_root).test[0]) == 0
