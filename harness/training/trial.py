"""One training run of protocol 2: a full schedule of T, 2T or 4T steps at one learning rate.

Linear warm-up over 5 % of the steps, then a cosine to 1 % of the peak; no weight decay, the same
initialisation and order of the data for both optimizers (by the seed). The loss of a run is that of
the fixed training subset in eval mode, with batch norm's statistics taken anew: after few steps the
running ones are those of weights long gone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from harness import tasks
from harness.errors import UserError
from harness.registry.entry import ModelEntry
from harness.tasks.base import Batch, Data, Task, target_entropy
from harness.training import checkpoints
from harness.training.loop import (
    EVALUATION_FACTOR,
    check_optimizer,
    evaluate,
    running,
    score_of_test,
    to_device,
    updates,
)
from harness.training.reference import reference_loss
from harness.training.schedule import learning_rate
from harness.training.speedup import Trial
from harness.training.stages import folder_of
from spectra_db.schema import VERSIONS

WARMUP, FINAL_FRACTION = 0.05, 0.01
NUM_EVALUATIONS = 16
NORM_BATCH = 256  # whatever the batch of a step is
NUM_LOOKS = 64  # how often a run looks whether it has diverged


def run_trial(
    entry: ModelEntry,
    data: Data,
    trial: Trial,
    *,
    checkpoint_dir: Path | None = None,
    keep: bool = False,
    device: str = "cpu",
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train an entry once.

    Args:
        entry: What to train, with a `speedup` recipe.
        data: The entry's data.
        trial: Which run of it.
        checkpoint_dir: Where the weights lie that a pretrained entry starts from, and are kept.
        keep: Save the final weights there.
        device: Where to compute.
        on_step: Called with (steps done, num_steps) after each step.

    Returns:
        Its row of table `trials`, but for who ran it, and the row of table `stages` of the weights
        that were kept, if they were.

    Raises:
        UserError: The entry has no such recipe, or its initial loss is not finite.
    """
    recipe = entry.speedup
    if recipe is None:
        raise UserError(f"model {entry.name!r} has no speedup recipe: it has no trials")
    check_optimizer(trial.optimizer)
    num_steps, seed = trial.num_steps, trial.seed
    begun, begun_cpu = time.perf_counter(), time.process_time()
    task = tasks.of(entry)
    whole = task.training_subset(data, recipe.eval_size)
    entropy = target_entropy(task, whole)
    subset = to_device(whole, device)
    model = checkpoints.initial_model(entry, data.model_options, seed, checkpoint_dir)
    # Convolutions on a CPU take 0.6 to 0.85 of the time so; other layers have no such format.
    model = model.to(device).to(memory_format=torch.channels_last)
    chunk = EVALUATION_FACTOR * recipe.batch_size

    def loss_now() -> tuple[float, float | None]:
        renew_batch_norm(model, task, tasks.split(subset, NORM_BATCH))
        return evaluate(task, model, subset, chunk)

    rate_at = partial(
        learning_rate,
        peak=trial.lr,
        warmup_steps=round(WARMUP * num_steps),
        num_steps=num_steps,
        final_fraction=FINAL_FRACTION,
    )
    steps = updates(
        model, task, data, recipe,
        optimizer=trial.optimizer, rate_at=rate_at, num_steps=num_steps, seed=seed, device=device,
    )  # fmt: skip
    looks = max(1, num_steps // NUM_LOOKS)
    due = {round(num_steps * i / NUM_EVALUATIONS) for i in range(1, NUM_EVALUATIONS + 1)}
    with running(model, seed, device):
        loss, score = loss_now()
        if not math.isfinite(loss):
            raise UserError(f"model {entry.name!r} has a loss of {loss} before the first step")
        curve = {0: loss}
        for step, batch_loss in enumerate(steps, 1):
            if on_step is not None:
                on_step(step, num_steps)
            if step % looks == 0 and not math.isfinite(batch_loss.item()):
                loss = math.nan
            elif step in due:
                loss, score = loss_now()
            if not math.isfinite(loss):
                break
            if step in due:
                curve[step] = loss
    diverged = not loss <= curve[0]
    kept = []
    if keep and not diverged:
        stage_row = checkpoints.keep(
            model, folder_of(checkpoint_dir or ".", entry.name, seed), entry,
            metric=score_of_test(task, model, data, recipe, device),
            stage="final", step=num_steps, loss=loss,
            optimizer=trial.optimizer, lr=trial.lr, seed=seed,
        )  # fmt: skip
        kept.append(stage_row)
    row = vars(trial) | {
        "model": entry.name,
        "protocol_version": VERSIONS["trials"],
        "init_loss": curve[0],
        "target_entropy": entropy,
        "reference_loss": reference_loss(entry, curve[0], entropy),
        "final_loss": None if diverged else loss,
        "accuracy": None if diverged else score,
        "diverged": diverged,
        "eval_steps": list(curve),
        "eval_losses": list(curve.values()),
        "batch_size": recipe.batch_size,
        "data_source": data.identity,
        "torch_version": torch.__version__,
        "device": device,
        "num_threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - begun,
        "cpu_seconds": time.process_time() - begun_cpu,
    }
    return row, kept


@torch.no_grad()
def renew_batch_norm(model: nn.Module, task: Task, batches: list[Batch]) -> None:
    """Replace the statistics of batch norms by their means over some batches, as the weights are.

    As `torch.optim.swa_utils.update_bn`, with a task's own way to run a model.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average over all that it sees
    try:
        model.train()
        for batch in batches:
            task.logits(model, batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
