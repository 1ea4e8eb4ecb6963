"""Spectra along a training of one's own, in the tables that every command reads."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import nn

from harness.campaign.spectrum import derived_rows
from harness.errors import UserError
from harness.estimator.batches import Batch, NumTerms, batch_hash
from harness.estimator.blocks import find_blocks
from harness.estimator.device import choose_device
from harness.estimator.objective import LossFn, Objective, taken
from harness.estimator.operators import opened
from harness.estimator.prepare import is_sharded
from harness.estimator.settings import Settings, check_names, whole_number
from harness.estimator.spectrum import gathered, rules
from harness.records.ledger import Ledger
from harness.records.provenance import describe_run
from harness.registry.entry import FACTS, check_slug
from spectra_db.jackknife import MIN_PROBES
from spectra_db.schema import PROTOCOL_VERSION

if TYPE_CHECKING:
    from transformers import TrainerCallback


class Recorder:
    """Takes spectra of a model every so many steps of its training.

    A step's rows are of stage `step-N` in the folder's tables `spectra`, `blocks` and
    `heterogeneity`, of which the last two follow from spectra in the protocol's arithmetic alone;
    `spectra_db.load(..., source=folder)` and `harness site --source FOLDER` read them. The model
    stays as it is, in its mode; its spectrum is that of evaluation mode.

    Example:
        >>> import tempfile, torch, spectra_db
        >>> model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        >>> folder, batch = tempfile.mkdtemp(), torch.ones(8, 4)
        >>> record = Recorder(folder, "mine", lambda m, b: m(b).square().mean(), [batch], every=50)
        >>> for step in range(100):  # the loop of a training
        ...     _ = record(model, step)
        >>> rows = spectra_db.load("spectra", source=folder)
        >>> rows[["stage", "block", "num_params"]].values.tolist()[:2]
        [['step-0', '0.weight', 20], ['step-0', '2.weight', 5]]
    """

    def __init__(
        self,
        folder: Path | str,
        name: str,
        loss_fn: LossFn,
        batches: Sequence[Batch],
        *,
        every: int,
        num_probes: int = 3,
        num_steps: int = 10,
        seed: int = 0,
        batch_weights: Sequence[float] | NumTerms | None = None,
        **settings: Any,
    ) -> None:
        """Say what is taken, and where it is written to.

        Args:
            folder: Of tables; those of other names and steps stay.
            name: Of the model, in lower-case letters, digits, '.', '_', '-'.
            loss_fn: (model, batch) ↦ the mean loss of the batch.
            batches: The fixed batch, as `estimate_spectra` takes it; gone through once, here.
            every: Steps between two spectra.
            num_probes: Probes per block; errors need 3.
            num_steps: Lanczos steps per probe. Rules are continued beyond them (docs/protocol.md).
            seed: Seeds the probes.
            batch_weights: As of `estimate_spectra`.
            **settings: partition and the others of `Settings`.

        Raises:
            UserError: One of them is out of range.
        """
        check_slug("name", name)
        check_names("a recorder", settings)
        self._ledger, self._name = Ledger(Path(folder)), name
        self._loss_fn, self._batches, self._count = loss_fn, taken(batches), batch_weights
        self._every = whole_number("every", every, 1)
        self._seed = whole_number("seed", seed, 0)
        whole_number("num_probes", num_probes, MIN_PROBES)
        self._settings = Settings(num_probes=num_probes, num_steps=num_steps, **settings)

    def __call__(self, model: nn.Module, step: int) -> pd.DataFrame | None:
        """Take the spectrum if it is the step's turn.

        Args:
            model: As it is after so many steps.
            step: Optimizer steps taken.

        Returns:
            The rows of table `spectra`; None at a step between.

        Raises:
            UserError: As `estimate_spectra`.
        """
        step = whole_number("step", step, 0)
        return None if step % self._every else self.take(model, step)

    def take(self, model: nn.Module, step: int) -> pd.DataFrame:
        """Take the spectrum at a step, whichever it is, such as the last."""
        step, settings = whole_number("step", step, 0), self._settings
        if is_sharded(model):  # nor would the others come, where a trainer asks process 0 alone
            raise UserError(
                "a Recorder takes no model that is sharded; call harness.estimate_spectra(..., "
                "product='differences') in all processes, as docs/scale.md has it"
            )
        objective = Objective(model, self._loss_fn, self._batches, self._count)
        blocks = find_blocks(model, settings.partition)
        source = {
            "model": self._name,
            "stage": f"step-{step}",
            "init_seed": self._seed,
            "train_run": "own",
            "batch_hash": batch_hash(objective.batches),
            "step": step,
            "progress": 0.0,
            "data_source": "",
        }
        device = str(choose_device(model, settings.device))
        command = shlex.join(sys.argv)  # of the user's own program
        run = describe_run(source | settings.key, replace(settings, device=device), command)
        with opened(objective, blocks, settings) as hessian:
            parts = rules(hessian, settings, source | {"run_id": run["run_id"]})
            rows = gathered(parts, blocks)
            self._ledger.write("models", [self._row_of_model(model, len(blocks))])
            self._ledger.write("runs", [run])
            self._ledger.write("spectra", rows)
            if settings.derives:
                summaries, found = derived_rows(hessian, rows)
                self._ledger.write("blocks", summaries)
                self._ledger.write("heterogeneity", found)
        return rows

    def for_trainer(self) -> TrainerCallback:
        """Return the callback that `transformers.Trainer(callbacks=[...])` takes.

        It takes spectra before the first step, every so many, and at the end, in the process of
        rank 0 where there are several.
        """
        from transformers import TrainerCallback

        recorder = self

        class Spectra(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
                if state.is_world_process_zero:
                    recorder(rest["model"], state.global_step)

            def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
                if state.is_world_process_zero:
                    recorder.take(rest["model"], state.global_step)

        return Spectra()

    def _row_of_model(self, model: nn.Module, num_blocks: int) -> dict[str, Any]:
        return dict.fromkeys(FACTS, "own") | {
            "model": self._name,
            "tier": "small",
            "num_params": sum(p.numel() for p in model.parameters()),
            "num_blocks": num_blocks,
            "status": "ok",
            "reason": None,
            "protocol_version": PROTOCOL_VERSION,
        }
