from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from harness import tasks
from harness.errors import UserError
from harness.tasks.base import Data, Task, target_entropy
from harness.tasks.images import Digits
from tests.processes import Process

SMALL = {  # options under which each task of the data packs loads in a few seconds
    "mnist": {"train_size": 300, "test_size": 100},
    "mnist-barcodes": {"train_size": 300, "test_size": 100, "rare_classes": 400},
    "cifar10": {"train_size": 300, "test_size": 100},
    "imagenet": {"train_size": 16},
    "tiny-shakespeare": {},
    "books": {},
    "wikitext": {"tokenizer": "word", "vocab_size": 500},
    "cornell": {"train_lines": 3_000, "vocab_size": 500},
    "sft": {"corpus": "dolly", "tokenizer": "char"},
}


EMBEDDED = ("digits", "pydoc", "gaussian-classes")  # they need no data root


class Uniform(nn.Module):
    """Give every class the same logit, in whatever shape the inputs ask for."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, x: Tensor) -> Tensor:
        leading = x.shape[:1] if x.is_floating_point() else x.shape
        return torch.zeros(*leading, self.num_classes)


@pytest.fixture(params=[*EMBEDDED, *SMALL])
def loaded(request: pytest.FixtureRequest) -> tuple[Task, Data]:
    name = request.param
    root = None if name in EMBEDDED else request.getfixturevalue("data_root")
    task = tasks.get(name, **SMALL.get(name, {}))
    return task, task.load(root)


def test_every_batch_has_one_leading_dimension_and_the_dtypes_of_its_kind(loaded) -> None:
    task, data = loaded
    batch = task.sample(data, "train", 5, torch.Generator().manual_seed(3))
    options = data.model_options
    if "dimension" in options:
        assert batch[0].shape == (5, options["dimension"])
        assert batch[0].dtype == torch.float32
        assert batch[1].shape == (5,)
    elif task.metric == "accuracy":
        side = options["image_size"]
        assert batch[0].shape == (5, options["in_channels"], side, side)
        assert batch[0].dtype == torch.float32
        assert batch[1].shape == (5,)
        assert batch[1].max() < options["num_classes"]
    else:
        assert all(tensor.shape == (5, options["context"]) for tensor in batch)
        assert all(tensor.dtype == torch.int64 for tensor in batch)
        assert batch[0].min() >= 0
        assert max(tensor.max() for tensor in batch) < options["vocab_size"]


def test_the_loss_is_the_mean_over_exactly_num_terms(loaded) -> None:
    task, data = loaded
    classes = data.model_options.get("num_classes") or data.model_options["vocab_size"]
    batch = task.fixed(data, "train", 6)
    whole = task.loss(Uniform(classes), batch)
    assert whole.item() == pytest.approx(math.log(classes), rel=1e-5)

    torch.manual_seed(0)
    logits = torch.randn(*task.logits(Uniform(classes), batch).shape)
    parts = tasks.split(batch, 4)
    assert [len(part[0]) for part in parts] == [4, 2]
    terms = [task.num_terms(part) for part in parts]
    weighted = [
        task.loss_of(values, part).item() * n
        for values, part, n in zip(logits.split(4), parts, terms, strict=True)
    ]
    assert sum(terms) == task.num_terms(batch)
    assert sum(weighted) / sum(terms) == pytest.approx(task.loss_of(logits, batch).item(), rel=1e-5)


def test_targets_are_one_a_term_and_their_entropy_is_at_most_uniform(loaded) -> None:
    task, data = loaded
    batch = task.fixed(data, "train", 6)
    targets = task.targets(batch)
    classes = data.model_options.get("num_classes") or data.model_options["vocab_size"]
    assert targets.shape == (task.num_terms(batch),)
    assert 0 <= targets.min() <= targets.max() < classes
    assert 0 < target_entropy(task, batch) < math.log(classes)


def test_the_entropy_is_that_of_the_frequencies() -> None:
    task, images = tasks.get("digits"), torch.zeros(8, 1, 8, 8)
    for labels, bits in ([3] * 8, 0), (range(8), 3), ([0, 0, 0, 0, 7, 7, 9, 9], 1.5):
        entropy = target_entropy(task, (images, torch.tensor(labels)))
        assert entropy == pytest.approx(bits * math.log(2), rel=1e-12)


@dataclass(frozen=True)
class Regression(Digits):
    """Have targets that are no classes."""

    name = "regression"

    def take(self, data, split, indices, generator):
        images, labels = super().take(data, split, indices, generator)
        return images, labels.float()


def test_targets_that_are_no_classes_have_no_entropy() -> None:
    task = Regression()
    batch = task.fixed(task.load(), "train", 4)
    assert task.targets(batch) is None
    assert target_entropy(task, batch) is None
    assert task.targets((batch[0], batch[1] > 4)) is None
    assert task.targets(batch[:1]) is None


def test_a_seed_decides_the_sample_and_fixed_needs_none(loaded) -> None:
    task, data = loaded
    first, again, other = (
        task.sample(data, "train", 8, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert not first[0].equal(other[0])
    torch.manual_seed(1234)
    fixed = task.fixed(data, "train", 8)
    torch.manual_seed(4321)
    assert all(a.equal(b) for a, b in zip(fixed, task.fixed(data, "train", 8), strict=True))


def test_the_training_stream_of_a_seed_is_reproducible(loaded) -> None:
    task, data = loaded
    streams = [task.batches(data, 4, torch.Generator().manual_seed(7)) for _ in range(2)]
    for _ in range(5):
        first, second = (next(stream) for stream in streams)
        assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_the_checksum_is_a_sha256_and_the_source_is_named(loaded) -> None:
    _, data = loaded
    assert len(bytes.fromhex(data.checksum)) == 32
    assert data.source


def test_data_are_loaded_once_a_process(data_root: Path) -> None:
    first = tasks.get("tiny-shakespeare").load(data_root)
    assert tasks.get("tiny-shakespeare").load(str(data_root)) is first


@pytest.mark.parametrize(
    ("name", "checksum"),
    [
        ("tiny-shakespeare", "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
        ("imagenet", "cdc2c602493bb1c57c384b9b7e2344e8a9089f20a8de4a329a2c33aa311e4eb9"),
        ("cornell", "071e6780bbebb23136da1f6c8ee4f07b9c5f2097c0374bb172a6eec9899ba257"),
    ],
)
def test_the_checksum_of_one_file_is_that_files_sha256(name, checksum, data_root: Path) -> None:
    assert tasks.get(name, **SMALL[name]).load(data_root).checksum == checksum


@pytest.mark.parametrize("name", ["digits", "mnist", "cifar10"])
def test_no_test_image_is_a_training_image(name: str, request) -> None:
    root = None if name == "digits" else request.getfixturevalue("data_root")
    data = tasks.get(name, **SMALL.get(name, {})).load(root)
    train, test = (
        {image.numpy().tobytes() for image in part[0]} for part in (data.train, data.test)
    )
    assert not train & test


def test_digits_are_split_1437_to_360_and_normalised() -> None:
    task = tasks.get("digits")
    data = task.load()
    assert (task.size(data, "train"), task.size(data, "test")) == (1437, 360)
    images, labels = task.fixed(data, "train", 1437)
    assert abs(images.mean()) < 1e-3
    assert abs(images.std() - 1) < 1e-3
    assert labels.bincount().min() > 100


def test_an_epoch_of_images_repeats_none() -> None:
    task = tasks.get("digits", train_size=100)
    data = task.load()
    stream = task.batches(data, 30, torch.Generator().manual_seed(0))
    epoch = torch.cat([next(stream)[0] for _ in range(3)])
    assert len(epoch.flatten(1).unique(dim=0)) == 90


def test_mnist_and_cifar_rows_are_balanced_as_documented(data_root: Path) -> None:
    data = tasks.get("cifar10", train_size=200, test_size=10).load(data_root)
    assert data.train[1].bincount().tolist() == [20] * 10
    task = tasks.get("mnist", train_size=2_000, test_size=10)
    images, _ = task.fixed(task.load(data_root), "train", 2_000)
    assert abs(images.mean()) < 0.05
    assert abs(images.std() - 1) < 0.05


def test_imagenet_has_one_image_a_class_and_no_test_split(data_root: Path) -> None:
    task = tasks.get("imagenet", train_size=16)
    data = task.load(data_root)
    assert data.model_options == {"num_classes": 1_000, "image_size": 224, "in_channels": 3}
    assert len(data.train[1].unique()) == 16
    with pytest.raises(ValueError, match="test split of task 'imagenet'; it has 0"):
        task.fixed(data, "test", 1)


def test_accuracy_counts_the_right_answers() -> None:
    task = tasks.get("digits")
    labels = torch.tensor([0, 1, 2, 3])
    logits = nn.functional.one_hot(torch.tensor([0, 1, 2, 9]), 10).float()
    assert task.score_of(logits, (torch.zeros(4), labels)) == 0.75


def test_too_large_a_batch_names_the_largest() -> None:
    task = tasks.get("digits")
    with pytest.raises(ValueError, match="choose between 1 and 360"):
        task.fixed(task.load(), "test", 361)


def test_unknown_names_and_options_get_help() -> None:
    with pytest.raises(UserError, match=r"unknown task 'cifar'; did you mean cifar10"):
        tasks.get("cifar")
    with pytest.raises(UserError, match="no option trainsize; its options are: train_size"):
        tasks.get("mnist", trainsize=3)


@pytest.mark.parametrize("name", [n for n in tasks.names() if n not in EMBEDDED])
def test_missing_data_name_the_path_and_the_remedy(name, tmp_path: Path, monkeypatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def refuse(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(UserError) as caught:
        tasks.get(name).load(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "--data-root" in message
    assert "HARNESS_DATA_ROOT" in message
    assert "\n" not in message
    hub = {"mnist": "ylecun/mnist", "cifar10": "uoft-cs/cifar10", "sft": "tatsu-lab/alpaca"}
    assert hub.get(name, "") in message
    page = Path("docs/commands.md").read_text("utf-8")
    wanted = re.findall(r"[\w/]+\.(?:parquet|txt|jsonl)", message.split(" below the data root ")[0])
    assert wanted
    assert [path for path in wanted if f"`{path}`" not in page] == []


def test_an_unreachable_hub_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A real connection, refused: no handler listens on the discard port of this machine.
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    code = "from harness import tasks; tasks.get('mnist').load()"
    monkeypatch.delenv("HARNESS_DATA_ROOT", raising=False)
    _, _, errors = Process([code], environment, tmp_path).communicate()
    message = errors.strip().splitlines()[-1]
    assert message.startswith("harness.errors.UserError: task 'mnist' needs mnist/train.parquet")
    assert "the Hub data set ylecun/mnist was tried and failed" in message


def test_a_data_root_that_is_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not a folder"):
        tasks.get("mnist").load(tmp_path / "nowhere")


def test_the_environment_names_the_data_root(data_root: Path, monkeypatch) -> None:
    monkeypatch.setenv("HARNESS_DATA_ROOT", str(data_root))
    assert tasks.get("tiny-shakespeare").load().source == "tinyshakespeare/input.txt"


def test_a_hub_data_set_is_read_where_the_root_lacks_it(tmp_path: Path, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")
    import numpy as np
    from huggingface_hub import HfApi
    from PIL import Image

    class Info:
        sha = "0123abcd"

    rows = [
        {"img": Image.fromarray(np.full((32, 32, 3), i, dtype=np.uint8)), "label": i}
        for i in range(6)
    ]
    stream = datasets.Dataset.from_list(
        rows,
        features=datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")}),
    ).to_iterable_dataset()
    asked = []

    def load_dataset(repo: str, **options: object) -> object:
        asked.append((repo, options["split"], options["revision"]))
        return stream

    monkeypatch.setattr(HfApi, "dataset_info", lambda *args, **kwargs: Info())
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = tasks.get("cifar10", train_size=4, test_size=2).load(tmp_path)
    assert asked == [("uoft-cs/cifar10", split, "0123abcd") for split in ("train", "test")]
    assert data.source == "Hub uoft-cs/cifar10 at 0123abcd"
    assert data.train[0].shape == (4, 3, 32, 32)
    assert data.test[1].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mnist", {"train_size": 0}, "train_size is 0; it must be a whole number of at least 1"),
        ("digits", {"test_size": -5}, "test_size is -5; .* at least 0"),
        ("pydoc", {"context": 0}, "context is 0"),
        ("openwebtext", {"context": "a"}, "context is 'a'"),
        ("openwebtext", {"documents": 0}, "documents is 0"),
        ("cornell", {"mask_fraction": 1.5}, "mask_fraction is 1.5"),
        ("sft", {"context": 0}, "context is 0"),
        ("cornell", {"mask_fraction": "abc"}, "mask_fraction is 'abc'; it must be a number"),
        ("digits", {"image_size": True}, "image_size is True; it must be a whole number or none"),
        ("pydoc", {"context": None}, "context is None; it must be a whole number"),
        ("pydoc", {"tokenizer": 5}, "tokenizer is 5; it must be text"),
        ("wikitext", {"context": [1]}, r"context is \[1\]; it must be a whole number"),
    ],
)
def test_sizes_that_can_not_be_are_refused(name, options, message) -> None:
    with pytest.raises(UserError, match=message):
        tasks.get(name, **options)


def test_a_size_is_no_truth_value() -> None:
    with pytest.raises(UserError, match="image_size is True; it must be a whole number"):
        Digits(image_size=True)


@pytest.mark.parametrize(
    ("name", "path", "content"),
    [
        ("tiny-shakespeare", "tinyshakespeare/input.txt", b"\xff\xff"),
        ("cornell", "cornell_movie_dialogs/movie_lines.txt", b" +++$+++ ".join([b"x"] * 5)),
        ("imagenet", "imagenet1k_sample/train.parquet", b"torn"),
    ],
)
def test_data_that_can_not_be_read_are_named_in_one_line(name, path, content, tmp_path) -> None:
    (tmp_path / path).parent.mkdir()
    (tmp_path / path).write_bytes(content)
    with pytest.raises(UserError, match=f"the data of task '{name}' can't be read below") as caught:
        tasks.get(name).load(tmp_path)
    assert "\n" not in str(caught.value)


def test_images_without_a_test_split_have_an_empty_one(tmp_path: Path) -> None:
    import io

    import pandas as pd
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("L", (28, 28)).save(buffer, "png")
    images = [{"bytes": buffer.getvalue()}] * 3
    (tmp_path / "mnist").mkdir()
    for split in ("train", "test"):
        rows = pd.DataFrame({"image": images, "label": [0, 1, 2]})
        rows.to_parquet(tmp_path / "mnist" / f"{split}.parquet")
    task = tasks.get("mnist", train_size=2, test_size=0)
    data = task.load(tmp_path)
    assert (task.size(data, "train"), task.size(data, "test")) == (2, 0)
    assert data.test[0].shape == (0, 1, 28, 28)


def test_a_task_of_someone_s_own_has_the_checksum_of_what_it_reads(monkeypatch):
    read = Digits().read

    def with_constant(factor):
        def own(self, root):
            data = read(root)
            return replace(data, train=(data.train[0] * factor, data.train[1]), checksum="0" * 64)

        kind = type("Own", (Digits,), {"read": own, "__module__": "stranger"})
        return kind().load().checksum

    assert with_constant(1.0) == with_constant(1.0) != with_constant(2.0)
    assert with_constant(1.0) != "0" * 64
