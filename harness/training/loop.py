"""One flat training loop for both optimizers.

Everything but the update rule is the same for SGD and AdamW: initialisation and order of the data
(by the seed), schedule, clipping, weight decay. Weight decay is the recipe's for both: decoupled in
AdamW (w <- w - lr wd w), an L2 term in SGD's gradient (g <- g + wd w), and only on tensors of two
dimensions or more, as in nanoGPT, which spares biases and norms.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness import tasks
from harness.errors import UserError
from harness.estimator.checks import fixed_arithmetic
from harness.registry.entry import ModelEntry, Recipe, SpeedupRecipe
from harness.tasks.base import Batch, Data, Task
from harness.training import checkpoints
from harness.training.schedule import learning_rate
from harness.training.stages import folder_of, stage_steps
from spectra_db.files import replaced
from spectra_db.schema import PROTOCOL_VERSION
from spectra_db.words import OPTIMIZERS

NUM_LOGGED = 50  # minibatch losses kept of a run, enough for a curve
EVALUATION_FACTOR = 4  # without a backward pass, four training batches fit where one did
_DATA_SEED = 1_000_000  # keeps the stream of the data apart from that of the initialisation


@dataclass(frozen=True)
class TrainingRun:
    """Hold one run.

    Attributes:
        rows: rows of table `training`.
        stage_rows: rows of table `stages`, one for each checkpoint that was saved.
        init_loss, final_loss: mean loss over the fixed training subset in eval mode; the final one
            is the initial one where the run diverged.
        final_score: accuracy on that subset at the end, or None.
        diverged: a loss that was not finite, or an end above the beginning.
        seconds: wall-clock time.
    """

    rows: list[dict[str, Any]]
    stage_rows: list[dict[str, Any]]
    init_loss: float
    final_loss: float
    final_score: float | None
    diverged: bool
    seconds: float


def train(
    entry: ModelEntry,
    data: Data,
    *,
    optimizer: str,
    lr: float,
    seed: int,
    checkpoint_dir: Path | str | None = None,
    pretrained_dir: Path | str | None = None,
    device: str = "cpu",
    on_gradients: Callable[[nn.Module], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> TrainingRun:
    """Train an entry by its recipe at one learning rate.

    Args:
        entry: what to train, with a recipe.
        data: the entry's data, `harness.tasks.of(entry).load(...)`.
        optimizer: "sgd" (with momentum) or "adamw".
        lr: peak learning rate.
        seed: of the initialisation, the order of the data and dropout.
        checkpoint_dir: save the entry's stages below it if the optimizer is AdamW; pass it on the
            one run whose stages are used (seed 1, best rate).
        pretrained_dir: where the stages of the entry lie that a pretrained one starts from;
            `checkpoint_dir` unless given.
        device: where to compute.
        on_gradients: called with the model before each update, to change its clipped gradients.
        on_step: called with (steps done, num_steps) after each step.

    Returns:
        The run; one that diverges stops early, is flagged and counts as its initial loss.

    Raises:
        UserError: the entry has no recipe, its pretraining is not done, or no such optimizer.
        ValueError: the loss is not finite before the first step.
    """
    if entry.recipe is None:
        raise UserError(f"model {entry.name!r} has no training recipe: only its init stage exists")
    check_optimizer(optimizer)
    started = time.perf_counter()
    recipe = entry.recipe
    task = tasks.of(entry)
    subset = to_device(task.training_subset(data, recipe.eval_size), device)
    chunk = EVALUATION_FACTOR * recipe.batch_size
    start = pretrained_dir or checkpoint_dir
    model = checkpoints.initial_model(entry, data.model_options, seed, start).to(device)
    init_loss, init_score = evaluate(task, model, subset, chunk)
    if not math.isfinite(init_loss):
        raise ValueError(f"model {entry.name!r} has a loss of {init_loss} before the first step")

    values = _measured(0, "train", init_loss, init_score)
    stage_rows: list[dict[str, Any]] = []
    stage_at: dict[str, int] = {}
    kept: AbstractContextManager[Path] = nullcontext(Path())
    if optimizer == "adamw" and checkpoint_dir is not None:
        stage_at = stage_steps(entry.stages, recipe.num_steps)
        # The stages that lie there are of one run always, and of one that ended.
        kept = replaced(folder_of(checkpoint_dir, entry.name, seed))

    def keep_stages(step: int, loss: float) -> None:
        """Save the stages that fall on this step (in a tiny budget, two may)."""
        for stage in [name for name, at in stage_at.items() if at == step and math.isfinite(loss)]:
            row = checkpoints.keep(
                model, folder, entry,
                metric=score_of_test(task, model, data, recipe, device),
                stage=stage, step=step, loss=loss, optimizer=optimizer, lr=lr, seed=seed,
            )  # fmt: skip
            stage_rows.append(row)

    step, diverged = 0, False
    log_every = max(1, recipe.num_steps // NUM_LOGGED)
    steps = updates(
        model,
        task,
        data,
        recipe,
        optimizer=optimizer,
        rate_at=partial(
            learning_rate,
            peak=lr,
            warmup_steps=recipe.warmup_steps,
            num_steps=recipe.num_steps,
            schedule=recipe.schedule,
        ),
        num_steps=recipe.num_steps,
        seed=seed,
        device=device,
        on_gradients=on_gradients,
    )
    with running(model, seed, device), kept as folder:
        keep_stages(0, init_loss)
        for loss in steps:
            if step % log_every == 0:
                value = loss.item()  # the only wait for the device
                diverged = not math.isfinite(value)
                values += _measured(step, "batch", value, None)
            step += 1
            if step in stage_at.values() and step < recipe.num_steps:
                keep_stages(step, evaluate(task, model, subset, chunk)[0])
            if on_step is not None:
                on_step(step, recipe.num_steps)
            if diverged:
                break
        final_loss, final_score = math.nan, None
        if not diverged:
            final_loss, final_score = evaluate(task, model, subset, chunk)
            keep_stages(step, final_loss)
    # Not training at all gives the initial loss, so an end above it has failed as surely as a nan.
    diverged = not final_loss <= init_loss
    if math.isfinite(final_loss) and task.size(data, "test"):
        values += _measured(step, "test", *evaluate_test(task, model, data, recipe, device))
    final_loss = init_loss if diverged else final_loss
    values += _measured(step, "train", final_loss, final_score)
    shared = {"model": entry.name, "optimizer": optimizer, "lr": lr, "seed": seed}
    shared |= {"diverged": diverged, "protocol_version": PROTOCOL_VERSION}
    names = ("step", "split", "metric", "value")
    rows = [shared | dict(zip(names, measured, strict=True)) for measured in values]
    seconds = time.perf_counter() - started
    return TrainingRun(rows, stage_rows, init_loss, final_loss, final_score, diverged, seconds)


def updates(
    model: nn.Module,
    task: Task,
    data: Data,
    recipe: Recipe | SpeedupRecipe,
    *,
    optimizer: str,
    rate_at: Callable[[int], float],
    num_steps: int,
    seed: int,
    device: str,
    on_gradients: Callable[[nn.Module], None] | None = None,
) -> Iterator[Tensor]:
    """Train a model, yielding the minibatch's loss (a scalar on the device) after each update.

    The model is in training mode at each step, whatever was done to it between two of them. To be
    used inside `running`.

    Args:
        model: Changed in place.
        task: Draws the batches and defines the loss.
        data: What it draws from.
        recipe: Batch size, clipping and the optimizers' settings.
        optimizer: "sgd" or "adamw".
        rate_at: The learning rate of a step, from 0.
        num_steps: Number of updates.
        seed: Of the order of the data.
        device: Where the model is.
        on_gradients: Called with the model before each update, to change its clipped gradients.
    """
    update = make_optimizer(model, recipe, optimizer, rate_at(0))
    generator = torch.Generator().manual_seed(seed + _DATA_SEED)
    batches = task.batches(data, recipe.batch_size, generator)
    for step in range(num_steps):
        model.train()
        for group in update.param_groups:
            group["lr"] = rate_at(step)
        loss = task.loss(model, to_device(next(batches), device))
        loss.backward()
        if recipe.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        if on_gradients is not None:
            on_gradients(model)
        update.step()
        update.zero_grad(set_to_none=True)
        yield loss.detach()


def check_optimizer(name: str) -> None:
    """Raise unless there is an optimizer of that name."""
    if name not in OPTIMIZERS:
        raise UserError(f"unknown optimizer {name!r}; choose one of {', '.join(OPTIMIZERS)}")


@contextmanager
def running(model: nn.Module, seed: int, device: str) -> Iterator[None]:
    """Seed what draws from the global generator (dropout), and fix the arithmetic of a device.

    A CPU's kernels are deterministic and compute in float32 as they are.
    """
    on_cpu = torch.device(device).type == "cpu"
    arithmetic = nullcontext() if on_cpu else fixed_arithmetic(model)
    with torch.random.fork_rng(devices=[] if on_cpu else [device]), arithmetic:
        torch.manual_seed(seed)
        yield


def make_optimizer(
    model: nn.Module, recipe: Recipe | SpeedupRecipe, optimizer: str, lr: float
) -> torch.optim.Optimizer:
    """Build SGD with momentum, or AdamW with the recipe's betas; see the module on decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=recipe.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=lr, betas=recipe.adamw_betas, fused=True)


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, batch: Batch, chunk: int) -> tuple[float, float | None]:
    """Return the mean loss and score over a batch, in eval mode, `chunk` samples at a time.

    Chunks are weighted by their number of terms (losses) and samples (scores).
    """
    model.eval()
    losses, terms, scores, sizes = [], [], [], []
    for part in tasks.split(batch, chunk):
        logits = task.logits(model, part)
        losses.append(task.loss_of(logits, part).item())
        terms.append(task.num_terms(part))
        scores.append(task.score_of(logits, part))
        sizes.append(len(part[0]))
    loss = sum(value * n for value, n in zip(losses, terms, strict=True)) / sum(terms)
    known = [s * n for s, n in zip(scores, sizes, strict=True) if s is not None]
    return loss, sum(known) / sum(sizes) if known else None


def evaluate_test(
    task: Task, model: nn.Module, data: Data, recipe: Recipe | SpeedupRecipe, device: str
) -> tuple[float, float | None]:
    """Evaluate on the test split: all of it for images, at most `eval_size` sequences of text."""
    size = task.size(data, "test")
    if task.metric != "accuracy":
        size = min(size, recipe.eval_size)
    batch = to_device(task.fixed(data, "test", size), device)
    return evaluate(task, model, batch, EVALUATION_FACTOR * recipe.batch_size)


def score_of_test(
    task: Task, model: nn.Module, data: Data, recipe: Recipe | SpeedupRecipe, device: str
) -> float | None:
    """Return the accuracy on the test split, None where there is none."""
    if task.metric != "accuracy" or not task.size(data, "test"):
        return None
    return evaluate_test(task, model, data, recipe, device)[1]


def _measured(
    step: int, split: str, loss: float, score: float | None
) -> list[tuple[int, str, str, float]]:
    """List step, split, metric and value of what is finite; a table has no place for nan."""
    pairs = [("loss", loss)] + ([] if score is None else [("accuracy", score)])
    return [(step, split, metric, value) for metric, value in pairs if math.isfinite(value)]


def to_device(batch: Batch, device: str) -> Batch:
    """Return the batch's tensors on a device.

    From pinned memory to a GPU: another copy would wait for all that the GPU has to do before it.
    """
    if torch.device(device).type == "cuda":
        return tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in batch)
    return tuple(tensor.to(device) for tensor in batch)
