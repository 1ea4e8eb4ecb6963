"""The interface of every task: load, sample, fixed, loss, num_terms."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.errors import UserError, reason_of
from harness.tasks import sources

Batch = tuple[Tensor, ...]
IGNORED = -100  # the target that torch's cross entropy leaves out of its mean
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Data:
    """Hold one loaded data set.

    Attributes:
        train, test: tensors that the task draws from; `test` may be empty.
        source: what was used and where it came from, for people.
        checksum: sha256 of the bytes that were used, hexadecimal; of a task of someone's own it is
            that of the tensors, whatever `read` says.
        model_options: what a model must know of its data (`num_classes`, `image_size`,
            `in_channels`, or `vocab_size`, `context`).
    """

    train: Batch
    test: Batch
    source: str
    checksum: str
    model_options: Mapping[str, Any]

    @property
    def identity(self) -> str:
        """What rows say of their data."""
        return f"{self.source}, sha256 {self.checksum[:12]}"

    def part(self, split: str) -> Batch:
        """Return the tensors of split "train" or "test"."""
        if split not in ("train", "test"):
            raise ValueError(f"unknown split {split!r}; the splits are train and test")
        return self.train if split == "train" else self.test


@dataclass(frozen=True)
class Task(ABC):
    """Draw batches and define the loss; subclasses are frozen dataclasses of their options."""

    name: ClassVar[str]
    extent: ClassVar[str] = ""  # how much data there are, for lists
    metric: ClassVar[str]  # "accuracy" where `score` gives one, else "loss"
    # True: the logits of position t may follow from the inputs up to t alone; False: from those
    # after it, too; None: the inputs are no sequences of tokens (B, T).
    causal: ClassVar[bool | None] = None
    # The loss of a sample depends on the others of its batch, as in contrastive losses: the batch
    # is never cut.
    is_joint: ClassVar[bool] = False

    def load(self, data_root: Path | str | None = None) -> Data:
        """Load the data, once per process and root.

        Args:
            data_root: folder of data sets (docs/commands.md); None means `HARNESS_DATA_ROOT`.

        Raises:
            UserError: neither the root nor the Hub has the data; says what to put where.
        """
        return _load_once(self, sources.resolve_root(data_root))

    @abstractmethod
    def read(self, root: Path | None) -> Data:
        """Read the data below `root`, uncached."""

    @abstractmethod
    def take(self, data: Data, split: str, indices: Tensor, generator: torch.Generator) -> Batch:
        """Gather samples `indices` (B,) of a split; whatever else is random uses the generator."""

    @abstractmethod
    def loss_of(self, logits: Tensor, batch: Batch) -> Tensor:
        """Average the loss over the terms of the batch, given the model's logits."""

    @abstractmethod
    def num_terms(self, batch: Batch) -> int:
        """Count the terms that the mean loss of this batch averages."""

    def count_of(self, batches: Sequence[Batch]) -> Callable[[Batch], int] | list[int]:
        """Return what counts the terms of a batch; of batches that may not be cut, the numbers."""
        return [self.num_terms(b) for b in batches] if self.is_joint else self.num_terms

    def score_of(self, logits: Tensor, batch: Batch) -> float | None:
        """Score the logits (accuracy in [0, 1]); None where the loss is the only measure."""
        return None

    def targets(self, batch: Batch) -> Tensor | None:
        """Return the classes that the mean loss of this batch averages over, one a term.

        By default the second tensor of the batch, flattened and without -100, where it holds
        integers. A task whose targets are elsewhere, or whose integers are no classes, says so by
        its own.

        Returns:
            (num_terms,) integers; None where the targets are no classes.
        """
        if len(batch) < 2 or batch[1].dtype not in _INTEGERS:
            return None
        flat = batch[1].flatten()
        return flat[flat != IGNORED]

    def size(self, data: Data, split: str) -> int:
        """Count the samples of a split that `fixed` can choose from."""
        return len(data.part(split)[0])

    def sample(self, data: Data, split: str, size: int, generator: torch.Generator) -> Batch:
        """Draw `size` distinct samples with the generator.

        Returns:
            Tensors with leading dimension `size`.
        """
        indices = torch.randperm(self._checked_size(data, split, size), generator=generator)
        return self.take(data, split, indices[:size], generator)

    def fixed(self, data: Data, split: str, size: int) -> Batch:
        """Choose `size` distinct samples, the same ones every time (seed 0).

        The Hessian batch is `fixed(data, "train", hessian_batch_size)`; it begins with the same
        samples as `training_subset`, and neither ever touches the test split.
        """
        generator = torch.Generator().manual_seed(0)
        indices = torch.randperm(self._checked_size(data, split, size), generator=generator)
        return self.take(data, split, indices[:size], generator)

    def training_subset(self, data: Data, eval_size: int) -> Batch:
        """Choose the fixed training subset, whose loss is a run's: `eval_size` samples, or all."""
        return self.fixed(data, "train", min(eval_size, self.size(data, "train")))

    def batches(self, data: Data, size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Yield training batches for ever: one permutation an epoch, its ragged rest dropped."""
        count = self._checked_size(data, "train", size)
        while True:
            order = torch.randperm(count, generator=generator)
            for start in range(0, count - size + 1, size):
                yield self.take(data, "train", order[start : start + size], generator)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Run the model on the inputs; transformers' and nanoGPT's outputs give up their logits.

        nanoGPT's forward gives those of the last position alone, unless it gets targets, too: it
        gets the inputs, and its own loss is not used.
        """
        inputs = batch[0]
        if _wants_targets.get(model):
            return _logits_of(model(inputs, targets=inputs))
        logits = _logits_of(model(inputs))
        if model not in _wants_targets:
            _wants_targets[model] = _is_last_alone(model, logits, inputs)
            return self.logits(model, batch) if _wants_targets[model] else logits
        return logits

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss over exactly `num_terms(batch)` terms, a scalar tensor."""
        return self.loss_of(self.logits(model, batch), batch)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return what `criterion` takes: the logits, or those of them that the loss depends on."""
        return self.logits(model, batch)

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the mean loss, given the outputs."""
        return self.loss_of(outputs, batch)

    def _checked_size(self, data: Data, split: str, size: int) -> int:
        """Return the number of samples of a split, or say that `size` is not available."""
        count = self.size(data, split)
        if not 1 <= size <= count:
            raise ValueError(
                f"{size} samples asked of the {split} split of task {self.name!r}; "
                f"it has {count}: choose between 1 and {count}"
            )
        return count


@dataclass(frozen=True)
class Classification(Task):
    """Classify samples; a batch is (inputs, labels (B,) int64)."""

    metric: ClassVar[str] = "accuracy"

    def take(self, data: Data, split: str, indices: Tensor, generator: torch.Generator) -> Batch:
        """Gather; nothing here is random."""
        inputs, labels = data.part(split)
        return inputs[indices], labels[indices]

    def loss_of(self, logits: Tensor, batch: Batch) -> Tensor:
        """Average the cross entropy over the samples."""
        return functional.cross_entropy(logits, batch[1])

    def score_of(self, logits: Tensor, batch: Batch) -> float:
        """Return the fraction of samples whose largest logit is the label's."""
        return float((logits.argmax(-1) == batch[1]).float().mean())

    def num_terms(self, batch: Batch) -> int:
        """Count the samples."""
        return len(batch[0])


# Models whose forward has been seen: whether it gives all logits only if it gets targets.
_wants_targets: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _logits_of(out: Any) -> Any:
    """Return the logits of what a model returned: a tensor, {"logits": ...} or (logits, loss)."""
    if isinstance(out, Mapping) and "logits" in out:
        return out["logits"]
    if isinstance(out, tuple) and len(out) == 2:
        logits, loss = out
        if loss is None or (isinstance(loss, Tensor) and loss.dim() == 0):
            return logits
    return getattr(out, "logits", out)


def _is_last_alone(model: nn.Module, logits: Any, inputs: Tensor) -> bool:
    """Tell whether they are those of the last position, of a forward that takes targets."""
    if not isinstance(logits, Tensor) or logits.dim() != 3 or inputs.dim() != 2:
        return False
    takes_targets = "targets" in inspect.signature(model.forward).parameters
    return takes_targets and logits.shape[1] == 1 < inputs.shape[1]


@lru_cache(maxsize=8)
def _load_once(task: Task, root: Path | None) -> Data:
    try:
        data = task.read(root)
        # What rows say of their data must follow from these; ours hash the files.
        if type(task).__module__.startswith("harness.tasks."):
            return data
        _check_data(task, data)
        return replace(data, checksum=_checksum(data))
    except (OSError, ValueError, LookupError) as error:
        where = "" if root is None else f" below {root}"
        raise UserError(
            f"the data of task {task.name!r} can't be read{where} ({reason_of(error)}); put whole "
            "files there"
        ) from error


def _check_data(task: Task, data: Any) -> None:
    """Raise unless `read` of someone's own task returned what it must."""
    form = "Data(train, test, source, checksum, model_options), train and test tuples of tensors"
    if not isinstance(data, Data):
        raise UserError(
            f"`read` of task {task.name!r} returned a {type(data).__name__}; it must return "
            f"harness.tasks.base.{form}"
        )
    for split in ("train", "test"):
        part = data.part(split)
        if not (isinstance(part, tuple) and all(isinstance(t, Tensor) for t in part)):
            raise UserError(
                f"`read` of task {task.name!r} gives {split} as {type(part).__name__}; it must "
                f"be a tuple of tensors: return {form}"
            )
    if not isinstance(data.model_options, Mapping):
        raise UserError(
            f"`read` of task {task.name!r} gives model_options as "
            f"{type(data.model_options).__name__}; it must be a dict such as {{'num_classes': 10}}"
        )


def _checksum(data: Data) -> str:
    """Return the sha256 of the tensors of both splits, with their types and shapes."""
    given = (*data.train, *data.test)
    # Cloned: of one element, a slice is contiguous with whatever stride, and can't be viewed.
    tensors = [t.detach().cpu().clone(memory_format=torch.contiguous_format) for t in given]
    kinds = [f"{len(data.train)}", *(f"{t.dtype} {tuple(t.shape)};" for t in tensors)]
    parts = [t.flatten().view(torch.uint8).numpy().tobytes() for t in tensors]
    return sources.sha256(["".join(kinds).encode(), *parts])


def check_sizes(task: Task, **least: int) -> None:
    """Raise a UserError unless options are whole numbers of at least so much, or None."""
    for name, low in least.items():
        value = getattr(task, name)
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (is_whole and value >= low):
            raise UserError(
                f"task {task.name!r}: {name} is {value!r}; it must be a whole number of at "
                f"least {low}"
            )


def target_entropy(task: Task, batch: Batch) -> float | None:
    """Return the entropy of the targets' frequencies, the loss of the best constant answer.

    H = -sum_k p_k ln p_k in nats, with p_k the fraction of the batch's terms whose target is k.

    Returns:
        H in [0, ln(num_terms)]; None where the targets are no classes, or there are none.
    """
    targets = task.targets(batch)
    if targets is None or not len(targets):
        return None
    _, counts = targets.unique(return_counts=True)
    return float(torch.special.entr(counts.double() / len(targets)).sum())
