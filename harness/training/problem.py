"""A problem: a model at a stage, its data and its loss, ready for the estimator."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from harness import tasks
from harness.errors import UserError
from harness.estimator.blocks import Block, find_blocks
from harness.estimator.cost import Forecast, forecast
from harness.estimator.hessian import BlockHessian
from harness.estimator.objective import LossFn, Objective, SplitLoss
from harness.estimator.operators import opened
from harness.estimator.settings import Settings
from harness.registry.entry import ModelEntry
from harness.tasks.base import Batch, Task
from harness.training import checkpoints
from harness.training.stages import STAGE_SEED, checkpoint_path, out_option, run_name


@dataclass(frozen=True)
class Problem:
    """Hold what a Hessian is the Hessian of.

    Attributes:
        entry, stage: where it comes from.
        model: in eval mode, on the CPU.
        loss_fn: `(model, batch) -> mean loss`, in two parts unless the task has its own `loss`.
        batches: the Hessian batch in microbatches.
        task: gives the loss, and counts the terms that its mean averages.
        step: updates made before this stage.
        progress: step / num_steps of the recipe, in [0, 1].
        init_seed: seed of the initialisation.
        train_run: "" at initialisation, "adamw-seedS" later.
        batch_size, microbatch_size: samples.
        num_terms: terms of all microbatches.
        data_source: what the data are, with the first 12 digits of their sha256.
    """

    entry: ModelEntry
    stage: str
    model: nn.Module
    loss_fn: LossFn
    batches: list[Batch]
    task: Task
    step: int
    progress: float
    init_seed: int
    train_run: str
    batch_size: int
    microbatch_size: int
    num_terms: int
    data_source: str

    @property
    def objective(self) -> Objective:
        """What is differentiated."""
        count = self.task.count_of(self.batches)
        return Objective(self.model, self.loss_fn, self.batches, count)

    @property
    def whole(self) -> Batch:
        """The Hessian batch in one piece."""
        return tuple(torch.cat(tensors) for tensors in zip(*self.batches, strict=True))

    def blocks(self, partition: str) -> list[Block]:
        """Return the blocks of the model."""
        entry = self.entry
        return find_blocks(
            self.model, partition, paper_blocks=entry.paper_blocks, kinds=entry.blocks
        )

    def forecast(
        self,
        settings: Settings,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Forecast:
        """Return what a spectrum costs, from one product per block on one sample."""
        blocks = self.blocks(settings.partition)
        return forecast(self.objective, blocks, settings, on_progress)

    def hessian(self, settings: Settings) -> AbstractContextManager[BlockHessian]:
        """Open the block Hessian, in its fixed arithmetic."""
        return opened(self.objective, self.blocks(settings.partition), settings)

    def on(self, batches: list[Batch]) -> Problem:
        """Return the problem on other samples."""
        sizes = [len(batch[0]) for batch in batches]
        return replace(
            self,
            batches=batches,
            batch_size=sum(sizes),
            microbatch_size=max(sizes),
            num_terms=sum(map(self.task.num_terms, batches)),
        )


def load_problem(
    entry: ModelEntry,
    stage: str = "init",
    seed: int = 1,
    *,
    data_root: Path | str | None = None,
    checkpoint_dir: Path | str | None = None,
    sha256: str | None = None,
    batch_size: int | None = None,
) -> Problem:
    """Build the problem of an entry at a stage.

    Args:
        entry: a registry entry.
        stage: one of the entry's stages; later ones than "init" need a checkpoint.
        seed: of the initialisation and of the AdamW run whose stages are used.
        data_root: see `harness.tasks`.
        checkpoint_dir: where `train` saved the stages; also those of the pretraining.
        sha256: what the hash of the stage's checkpoint must be, where it is known.
        batch_size: samples of the Hessian's batch; None: as many as the entry says.

    Raises:
        UserError: the entry has no such stage, the stage or the pretraining is not trained yet
            (the message names the command), its checkpoint is corrupted, or the data are missing.
    """
    if stage not in entry.stages:
        raise UserError(
            f"model {entry.name!r} has no stage {stage!r}; its stages: {', '.join(entry.stages)}"
        )
    path = None
    if stage != "init":
        path = checkpoint_path(checkpoint_dir or ".", entry.name, seed, stage)
        if checkpoint_dir is None or not path.is_file():
            where = f"no checkpoint {path}" if checkpoint_dir else "no checkpoint folder is given"
            into = out_option(checkpoint_dir)
            run = f"run: harness run {entry.name} {into}"
            if seed != STAGE_SEED and entry.speedup is None:
                run += f", then harness train {entry.name} --seed {seed} {into}"  # at the best rate
            elif seed != STAGE_SEED:
                run = f"protocol 2 keeps the weights of seed {STAGE_SEED} alone"
            raise UserError(
                f"stage {stage!r} of {entry.name!r} is not trained yet for seed {seed} ({where}); "
                f"{run}"
            )
    task = tasks.of(entry)
    data = task.load(data_root)
    if path is None:
        model, step = checkpoints.initial_model(entry, data.model_options, seed, checkpoint_dir), 0
    else:
        model = entry.build(data.model_options, seed)
        step = int(checkpoints.load(model, path, sha256=sha256, entry=entry)["step"])
    model.eval()  # an author's override may return nothing
    batch = task.fixed(data, "train", batch_size or entry.hessian_batch_size)
    microbatch_size = min(entry.microbatch_size or len(batch[0]), len(batch[0]))
    batches = tasks.split(batch, microbatch_size)
    # A loss that a task of someone's own defines has no parts.
    is_split = type(task).loss is Task.loss
    recipe = entry.recipe or entry.speedup
    return Problem(
        entry=entry,
        stage=stage,
        model=model,
        loss_fn=SplitLoss(task.outputs, task.criterion) if is_split else task.loss,
        batches=batches,
        task=task,
        step=step,
        progress=step / recipe.num_steps if recipe else 0.0,
        init_seed=seed,
        train_run="" if stage == "init" else run_name(seed),
        batch_size=len(batch[0]),
        microbatch_size=microbatch_size,
        num_terms=sum(map(task.num_terms, batches)),
        data_source=data.identity,
    )
