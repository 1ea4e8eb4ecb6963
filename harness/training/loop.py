"""One flat training loop for both optimizers.

Everything but the update rule is the same for SGD and AdamW: initialisation and order of the data
(by the seed), schedule, clipping, weight decay. Weight decay is the recipe's for both: decoupled in
AdamW (w <- w - lr wd w), an L2 term in SGD's gradient (g <- g + wd w), and only on tensors of two
dimensions or more, as in nanoGPT, which spares biases and norms.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness import tasks
from harness.errors import UserError
from harness.registry.entry import ModelEntry, Recipe
from harness.tasks.base import Batch, Data, Task
from harness.training import stages
from harness.training.schedule import learning_rate
from spectra_db.schema import PROTOCOL_VERSION

OPTIMIZERS = ("sgd", "adamw")
MOMENTUM = 0.9
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
        data: the entry's data, `harness.tasks.get(entry.task, ...).load(...)`.
        optimizer: "sgd" (momentum 0.9) or "adamw".
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
    if optimizer not in OPTIMIZERS:
        raise UserError(f"unknown optimizer {optimizer!r}; choose one of {', '.join(OPTIMIZERS)}")
    started = time.perf_counter()
    recipe = entry.recipe
    task = tasks.get(entry.task, **entry.task_options)
    subset = _to(task.fixed(data, "train", min(recipe.eval_size, task.size(data, "train"))), device)
    chunk = EVALUATION_FACTOR * recipe.batch_size
    start = pretrained_dir or checkpoint_dir
    model = stages.initial_model(entry, data.model_options, seed, start).to(device)
    init_loss, init_score = evaluate(task, model, subset, chunk)
    if not math.isfinite(init_loss):
        raise ValueError(f"model {entry.name!r} has a loss of {init_loss} before the first step")

    values: list[tuple[int, str, str, float]] = []  # step, split, metric, value
    values += _measured(0, "train", init_loss, init_score)
    stage_rows: list[dict[str, Any]] = []
    scored = task.metric == "accuracy" and task.size(data, "test") > 0
    stage_at: dict[str, int] = {}
    kept: AbstractContextManager[Path] = nullcontext(Path())
    if optimizer == "adamw" and checkpoint_dir is not None:
        stage_at = stages.stage_steps(entry.stages, recipe.num_steps)
        kept = stages.replaced(stages.folder_of(checkpoint_dir, entry.name, seed))

    def keep_stages(step: int, loss: float) -> None:
        """Save the stages that fall on this step (in a tiny budget, two may)."""
        for stage in [name for name, at in stage_at.items() if at == step and math.isfinite(loss)]:
            facts = {"model": entry.name, "stage": stage, "step": step, "loss": loss}
            facts |= {"optimizer": optimizer, "lr": lr, "seed": seed}
            path = folder / stages.file_name(stage)
            sha256 = stages.save(model, path, {**facts, "entry_hash": stages.entry_hash(entry)})
            score = evaluate_test(task, model, data, recipe, device)[1] if scored else None
            facts |= {"metric": score, "checkpoint_sha256": sha256}
            stage_rows.append(facts | {"protocol_version": PROTOCOL_VERSION})

    step, diverged = 0, False
    log_every = max(1, recipe.num_steps // NUM_LOGGED)
    update = make_optimizer(model, recipe, optimizer, lr)
    batches = task.batches(
        data, recipe.batch_size, torch.Generator().manual_seed(seed + _DATA_SEED)
    )
    with torch.random.fork_rng(devices=[]), kept as folder:
        keep_stages(0, init_loss)
        torch.manual_seed(seed)  # dropout draws from the global generator
        model.train()
        while step < recipe.num_steps and not diverged:
            rate = learning_rate(
                step,
                peak=lr,
                warmup_steps=recipe.warmup_steps,
                num_steps=recipe.num_steps,
                schedule=recipe.schedule,
            )
            for group in update.param_groups:
                group["lr"] = rate
            loss = task.loss(model, _to(next(batches), device))
            loss.backward()
            if recipe.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            if on_gradients is not None:
                on_gradients(model)
            update.step()
            update.zero_grad(set_to_none=True)
            if step % log_every == 0:
                value = loss.item()  # the only wait for the device
                diverged = not math.isfinite(value)
                values += _measured(step, "batch", value, None)
            step += 1
            if step in stage_at.values() and step < recipe.num_steps:
                keep_stages(step, evaluate(task, model, subset, chunk)[0])
                model.train()
            if on_step is not None:
                on_step(step, recipe.num_steps)
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
    rows = [
        {
            **shared,
            "step": at,
            "split": split,
            "metric": metric,
            "value": value,
            "diverged": diverged,
            "protocol_version": PROTOCOL_VERSION,
        }
        for at, split, metric, value in values
    ]
    seconds = time.perf_counter() - started
    return TrainingRun(rows, stage_rows, init_loss, final_loss, final_score, diverged, seconds)


def make_optimizer(
    model: nn.Module, recipe: Recipe, optimizer: str, lr: float
) -> torch.optim.Optimizer:
    """Build SGD with momentum 0.9, or AdamW with the recipe's betas; see the module on decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=MOMENTUM, fused=True)
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
    task: Task, model: nn.Module, data: Data, recipe: Recipe, device: str
) -> tuple[float, float | None]:
    """Evaluate on the test split: all of it for images, at most `eval_size` sequences of text."""
    size = task.size(data, "test")
    if task.metric != "accuracy":
        size = min(size, recipe.eval_size)
    batch = _to(task.fixed(data, "test", size), device)
    return evaluate(task, model, batch, EVALUATION_FACTOR * recipe.batch_size)


def _measured(
    step: int, split: str, loss: float, score: float | None
) -> list[tuple[int, str, str, float]]:
    """List what is finite of a loss and a score; a table has no place for nan."""
    pairs = [("loss", loss)] + ([] if score is None else [("accuracy", score)])
    return [(step, split, metric, value) for metric, value in pairs if math.isfinite(value)]


def _to(batch: Batch, device: str) -> Batch:
    return tuple(tensor.to(device) for tensor in batch)
