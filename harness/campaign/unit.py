"""One piece of work, as training runs and spectra are."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from harness.training.stages import STAGE_SEED

# What an entry is made of: training runs of protocol 2 and of protocol 1, spectra, and the metrics
# that need few products, on a larger batch.
KINDS = ("trial", "train", "spectrum", "moments")


@dataclass(frozen=True)
class Unit:
    """One piece of work that is done as a whole or again.

    Attributes:
        model: Name of the entry.
        kind: One of KINDS, or predictors, which `harness predictors` takes.
        optimizer, lr, seed: Of a training run.
        num_steps: Of a trial.
        stage, partition: Of a spectrum; moments are of the entry's partition.
        ready: Whether it could start now; a run at the best rate has no rate before.
        blocks: Some blocks of a spectrum, to be taken alone; empty for all.
    """

    model: str
    kind: str
    optimizer: str = ""
    lr: float = 0.0
    seed: int = STAGE_SEED
    stage: str = ""
    partition: str = ""
    ready: bool = True
    blocks: tuple[str, ...] = ()
    num_steps: int = 0

    @property
    def slug(self) -> str:
        """A name for files; runs that keep their stages, in one folder, have one at all rates."""
        of = self.partition or self.kind
        if self.kind == "train" and (self.optimizer, self.seed) != ("adamw", STAGE_SEED):
            of = f"{self.lr:g}"
        what = self.stage or self.optimizer, of, str(self.seed)
        name = "-".join([self.model, *what])
        blocks = hashlib.sha256("\n".join(self.blocks).encode()).hexdigest()[:8]
        return f"{name}-{blocks}" if self.blocks else name

    def __str__(self) -> str:
        if self.kind in ("train", "trial"):
            steps = f", {self.num_steps} steps" if self.num_steps else ""
            return f"{self.model}: {self.optimizer} at {self.lr:g}, seed {self.seed}{steps}"
        if self.kind == "moments":
            return f"{self.model}: moments on a larger batch at {self.stage}"
        if self.kind == "predictors":
            return f"{self.model}: predictors"
        return f"{self.model}: {self.partition} spectrum at {self.stage}"
