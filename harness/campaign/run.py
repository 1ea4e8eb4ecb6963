"""Whole entries: the grid, the seeds, the stages and their spectra, resumable from the folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from harness import tasks
from harness.campaign.agenda import Agenda, Event
from harness.campaign.drive import drive
from harness.campaign.engines import Engine, Execute
from harness.campaign.engines.local import Here, Workers, sharers
from harness.campaign.pace import Pace
from harness.campaign.plan import missing
from harness.campaign.survey import Survey
from harness.campaign.unit import Unit
from harness.campaign.work import Job, execute, note_failure
from harness.errors import output_error
from harness.records import version
from harness.records.provenance import describe_model
from harness.registry import ModelEntry
from harness.tasks.base import target_entropy
from harness.training.gap import gap
from harness.training.reference import reference_loss
from harness.training.speedup import speedup


def run_entries(
    surveys: Sequence[Survey],
    job: Job,
    *,
    jobs: int = 1,
    engine: Callable[[Execute], Engine] | None = None,
    on_event: Event = lambda what, unit, facts: None,
) -> dict[Unit, str]:
    """Do everything for some entries, from where the folder stands.

    A unit is tried once; what comes of it may make others ready. Interrupted, the workers end at
    once: a table's file is replaced as a whole, so that only the work in flight is lost. Several
    processes may work in one folder: each takes what no other one does, and waits for the rest.

    Args:
        surveys: The entries; those with a reason get their row of table `models` alone.
        job: Where and how.
        jobs: Worker processes; 1 works in this process.
        engine: Makes what does the units instead, such as `engines.ray.Tasks`.
        on_event: Called with start, progress, done, failed or elsewhere, the unit, and facts.

    Returns:
        The units that failed, with their reasons; they are rows in the folder too.

    Raises:
        OutputError: The folder can't be written to any more, as when the disk is full, or was
            removed.
        UserError: The folder holds results of another version of an entry.
    """
    ledger, able = job.ledger, [survey for survey in surveys if survey.reason is None]
    live = [survey.entry for survey in able]
    try:
        for survey in able:
            version.check(survey.entry, ledger, survey.num_params)
        pace = Pace({survey.entry.name: survey.unit_flops for survey in surveys})
        agenda = Agenda(live, job, on_event, partial(_finish, job), pace)
        for survey in surveys:
            if survey.reason is None:
                version.note(survey.entry, ledger)
            counts = survey.num_params, survey.num_blocks
            ledger.write("models", [describe_model(survey.entry, *counts, survey.reason)])
        if engine is None:
            job = replace(job, sharers=sharers(jobs, job.device))
        do = partial(execute, job=job)
        if engine is not None:
            drive(agenda, engine(do))
        elif jobs == 1:
            drive(agenda, Here(do, agenda.progress))
        else:
            drive(agenda, Workers(do, jobs, spread=job.device == "cuda"))
        for entry in live:
            _finish(job, entry, agenda.failed)
        return agenda.failed
    except OSError as error:
        if (stop := output_error(ledger.folder, error)) is not None:
            raise stop from error
        raise


def _finish(job: Job, entry: ModelEntry, failed: Mapping[Unit, str]) -> None:
    """Write an entry's gap, and rows for the stages that a failed run left without weights."""
    ledger = job.ledger
    if entry.speedup is not None:
        rows = ledger.rows("trials", entry.name)
        ledger.write("speedups", [speedup(entry.name, rows, entry.speedup)])
    if entry.grid_recipe is None:
        return
    reasons = [r for u, r in failed.items() if (u.model, u.kind) == (entry.name, "train")]
    for unit in missing(entry, ledger) if reasons else ():
        if unit.kind == "spectrum" and not unit.ready:
            note_failure(unit, job, f"its stage was not trained: {reasons[0]}")
    task, data = tasks.of(entry), job.data(entry)
    entropy = target_entropy(task, task.training_subset(data, entry.grid_recipe.eval_size))
    row = gap(
        entry.name,
        ledger.rows("training", entry.name),
        entry.grid_recipe,
        entropy=entropy,
        reference=partial(reference_loss, entry, entropy=entropy),
    )
    if reasons:
        row |= {"status": "failed", "reason": reasons[0]}
    ledger.write("gaps", [row])
