"""What the commands print: tables, forecasts, results."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from spectra_db.words import WHOLE

if TYPE_CHECKING:
    import pandas as pd

    from harness.campaign.forecast import Outlook
    from harness.campaign.survey import Survey
    from harness.estimator import Block
    from harness.estimator.cost import Forecast
    from harness.registry import ModelEntry
    from harness.submission.validate import Finding
    from harness.submission.verify import Check
    from spectra_db.jackknife import Estimate

_UNBOUNDED = 10_000
_CLOSE = (0, 1, 0, 0)  # padding


def _console() -> Console:
    """Return a console that wraps lines at the terminal's width, and in a file or pipe nowhere.

    Brackets are no markup: block names have some.
    """
    console = Console(markup=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _UNBOUNDED
    return console


def _table(
    *names: str, numbers: Sequence[str] = (), after: Sequence[str] = (), **options: Any
) -> Table:
    """Return a table of columns of text, of numbers to the right, and of text after them.

    Each is whole at any width.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False, **options)
    for name in names:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", overflow="fold")
    for name in after:
        table.add_column(name, overflow="fold")
    return table


def print_entries(entries: Sequence[Any], fields: Sequence[str]) -> None:
    """Print the named fields of entries, a line each, whole even where a terminal is narrower."""
    table = _table(padding=_CLOSE)
    for field in fields:
        table.add_column(field, no_wrap=True)
    for entry in entries:
        table.add_row(*(getattr(entry, field) for field in fields))
    console = _console()
    unlimited = console.options.update(max_width=_UNBOUNDED)
    console.width = max(console.width, console.measure(table, options=unlimited).maximum)
    console.print(table)


def print_blocks(blocks: Sequence[Block], cost: Forecast | None) -> None:
    """Print blocks with their kind, shape, size and, where known, the cost of one product."""
    numbers = ("shape", "parameters", *(["GFLOP"] if cost else []))
    table = _table("block", "kind", numbers=numbers)
    for i, block in enumerate(blocks):
        shape = " × ".join(map(str, block.shape))
        flops = [f"{cost.block_flops[i] / 1e9:.3g}"] if cost else []
        kind = f"{block.kind} ?" if block.is_guessed else block.kind
        table.add_row(block.name, kind, shape, f"{block.num_params:,}", *flops)
    _console().print(table)


def print_surveys(surveys: Sequence[Survey]) -> None:
    """Print what entries cost."""
    numbers = ("parameters", "units", "products", "TFLOP", "graph MiB")
    table = _table("model", numbers=numbers)
    for survey in (s for s in surveys if s.reason is None):
        table.add_row(
            survey.entry.name,
            f"{survey.num_params:,}",
            str(survey.num_units),
            f"{survey.num_products:,}",
            f"{(survey.spectra_flops + survey.training_flops) / 1e12:.3g}",
            f"{survey.graph_bytes / 2**20:,.0f}",
        )
    console = _console()
    console.print(table)
    for survey in (s for s in surveys if s.reason is not None):
        console.print(f"left out: {survey.entry.name}: {survey.reason}")


def print_outlooks(outlooks: Sequence[Outlook], device: str, source: str) -> None:
    """Print what entries take on a device, and all of them."""
    from harness.campaign.forecast import total

    numbers = ("products", "PFLOP", "device-hours", "memory GiB", "disk MiB")
    table = _table("model", numbers=numbers)
    for entry in [*outlooks, total(outlooks)]:
        if entry.model == WHOLE:
            table.add_section()
        table.add_row(
            entry.model,
            f"{entry.num_products:,}",
            f"{entry.flops / 1e15:,.3g}",
            f"{entry.hours:,.3g}",
            f"{entry.memory_bytes / 2**30:,.2g}",
            f"{entry.disk_bytes / 2**20:,.3g}",
        )
    console = _console()
    console.print(table)
    console.print(f"on one {device}; throughput {source}")


def print_results(out: Path, entries: Sequence[ModelEntry]) -> None:
    """Print JS⁰ and how far SGD is behind of models, each with its error, as the tables have them.

    That is the gap, and of entries of protocol 2 the log2 speed-up.
    """
    from harness.leaderboard import report, standings
    from harness.records.ledger import Ledger
    from harness.training.stages import STAGE_SEED
    from spectra_db.heterogeneity import LEADING

    protocols = dict.fromkeys("gaps" if entry.speedup is None else "speedups" for entry in entries)
    behind = {"gaps": "SGD-Adam gap", "speedups": "log2 speed-up, 95 % interval"}
    table = _table("model", numbers=("JS⁰", *(behind[name] for name in protocols), "Adam needed"))
    ledger = Ledger(out)
    for entry in entries:
        js0 = needed = "–"
        found = dict.fromkeys(protocols, "–")
        asked = ("js0", LEADING["js0"], "init", entry.partition, STAGE_SEED)
        for row in ledger.rows("heterogeneity", entry.name).itertuples():
            if (row.metric, row.scale, row.stage, row.partition, row.init_seed) == asked:
                js0 = f"{row.corrected:.3f} ± {row.standard_error:.3f}"
        for name in protocols:
            for result in ledger.rows(name, entry.name).to_dict("records"):
                if result["status"] != "ok":
                    found[name] = str(result["status"])
                elif name == "gaps":
                    found[name] = f"{result['gap']:.3f} ± {result['standard_error']:.3f}"
                    needed = report.answer(result)
                else:
                    found[name] = _speedup(result)
                    needed = standings.answer(result)
        table.add_row(entry.name, js0, *found.values(), needed)
    _console().print(table)


def _number(value: Any, spec: str = ".2f") -> str:
    """Format a number, a dash for none."""
    return "–" if value is None or value != value else format(value, spec)


def _speedup(row: Mapping[Any, Any]) -> str:
    """Return the log2 speed-up of a row of `speedups` with its interval."""
    from harness.leaderboard.standings import interval, short

    numbers = (short(row[end]) for end in ("log2_speedup", "ci_low", "ci_high"))
    return interval(*numbers, is_bound=bool(row["censored"]))


def print_speedups(standings: Sequence[Mapping[str, Any]]) -> None:
    """Print the log2 speed-up of entries with its 95 % interval, ranked ones first."""
    table = _table("model", numbers=("log2 speed-up, 95 % interval", "Adam needed", "J"))
    for ranked in (True, False):
        for row in standings:
            if row["ranked"] == ranked and not row["reason"]:
                j = _number(row["J"], ".3f")
                table.add_row(row["model"], row["speedup"], row["needed"], j)
        table.add_section()
    if table.row_count:
        _console().print(table)


def print_measures(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print how each measure goes with the speed-up, and what it has less than J."""
    numbers = ("entries", "ρ", "p", "p (Holm)", "less J's", "pairs right")
    table = _table("measure", "kind", numbers=numbers)
    for row in rows:
        p, p_holm = (_number(row[key], ".2g") for key in ("p", "p_holm"))
        low, high = (_number(row[f"difference_{end}"]) for end in ("low", "high"))
        less = "–" if row["kind"] == "primary" else f"{_number(row['difference'])} [{low}, {high}]"
        pairs = f"{row['right_pairs']} of {row['decided_pairs']}"
        rho = _number(row["rho"])
        table.add_row(row["label"], row["kind"], str(row["n"]), rho, p, p_holm, less, pairs)
    if rows:
        _console().print(table)


def print_pairs(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the pairs that differ in one thing: by how much in speed-up and in J."""
    numbers = ("Δ log2 speed-up", "ΔJ")
    table = _table("pair", "first", "second", numbers=numbers, after=("outcome",))
    for row in rows:
        dy = "–" if row["dy"] != row["dy"] else f"{row['dy']:.2f} ± {row['dy_error']:.2f}"
        dj = _number(row["dj"], "+.3f")
        table.add_row(row["pair"], row["model_a"], row["model_b"], dy, dj, row["outcome"])
    if rows:
        _console().print(table)


def print_leaderboard(
    rows: Sequence[dict[str, Any]], columns: Mapping[str, str], stage: str
) -> None:
    """Print what predicts the gap, a measure a line, with 95 % intervals."""
    numbers = ("products", *columns.values())
    table = _table(f"measure at {stage}", numbers=numbers, padding=_CLOSE)
    for row in rows:
        cells = [str(row[c]) if c in row else "–" for c in columns]
        table.add_row(row["label"], f"{row['num_products']:.0f}", *cells)
    _console().print(table)


def print_prediction(result: Mapping[str, Any]) -> None:
    """Print whether a model will need Adam, why, how sure that is, and what it cost."""
    from harness.leaderboard.report import LABELS

    console = _console()
    console.print(f"{result['target']}: {result['answer']}")
    console.print(
        f"probability that it needs Adam {result['probability']:.2f} "
        f"[{result['low']:.2f}, {result['high']:.2f}], from {result['num_models']} models of "
        f"{result['num_families']} families"
        + (", its own rows left out" if result["in_leaderboard"] else "")
    )
    numbers, after = ("value", "larger than"), ("nearest models (gap)",)
    table = _table("measure", numbers=numbers, after=after, padding=_CLOSE)
    for row in result["measures"]:
        table.add_row(
            LABELS[row["metric"]],
            f"{row['value']:.3g} ± {row['standard_error']:.1g}",
            f"{row['num_smaller']} of {result['num_models']}",
            ", ".join(f"{near['model']} ({near['gap']:.2f})" for near in row["nearest"]),
        )
    console.print(table)
    for reason in result["reasons"]:
        console.print(f"unclear: {reason}")
    console.print(result["worth"])
    cost = result["cost"]
    console.print(
        f"cost: {cost['num_products']:,} products of {cost['num_blocks']} blocks, "
        f"{cost['seconds']:.1f} s; data {result['data']}"
    )


def print_checks(checks: Sequence[Check]) -> None:
    """Print what came of verified rows, those that can't be verified gathered by reason."""
    numbers = ("probe", "deviation", "allowed")
    names, after = ("model", "stage", "block"), ("outcome",)
    table = _table(*names, numbers=numbers, after=after, padding=_CLOSE)
    reasons: Counter[str] = Counter()
    for check in checks:
        if check.outcome == "unverifiable":
            reasons[str(check.reason)] += 1
            continue
        sizes = ["–" if x is None else f"{x:.1e}" for x in (check.deviation, check.allowed)]
        outcome = check.outcome if check.reason is None else f"{check.outcome}: {check.reason}"
        table.add_row(check.model, check.stage, check.block, str(check.probe), *sizes, outcome)
    console = _console()
    console.print(table)
    for reason, count in reasons.most_common():
        console.print(f"not verifiable here ({count}): {reason}")


def print_finding(finding: Finding) -> None:
    """Print what came of a check, the text indented under itself."""
    line = Table.grid(padding=(0, 2, 0, 0))
    line.add_column(width=7)
    line.add_column(width=18)
    line.add_column(overflow="fold")
    line.add_row(finding.outcome, finding.check, finding.text)
    _console().print(line)


def print_differences(changes: Mapping[str, pd.DataFrame], num_rows: int) -> None:
    """Print how many rows of each table changed and how, and the first that changed for good."""
    kinds = ("added", "removed", "changed", "within")
    table = _table("table", numbers=(*kinds[:-1], "within errors"))
    for name, rows in changes.items():
        counts = rows["change"].value_counts()
        table.add_row(name, *(f"{counts.get(kind, 0):,}" for kind in kinds))
    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print(table)
    for name, rows in changes.items():
        changed = rows[rows["change"] == "changed"]
        for _, row in changed.head(num_rows).iterrows():
            place = ", ".join(str(x) for x in row.iloc[: row.index.get_loc("change")])
            move = f"{row['before']} → {row['after']} (allowed {row['allowed']:.2g})"
            console.print(f"{name}: {place}: {row['column']} {move}")
        if len(changed) > num_rows:
            console.print(f"{name}: {len(changed) - num_rows} more; --rows prints them")


def print_provenance(found: dict[str, Any]) -> None:
    """Print a model's numbers, and the spectra, training runs and commands they come from."""
    from spectra_db.schema import BEST_RATES

    console = Console(markup=False, highlight=False, soft_wrap=True)
    model = found["model"]
    version = f"release {found['version']}" if found["version"] else "no release"
    console.print(f"{model['model']} ({model['family']}, {model['task']}), {version}")
    gap, speedup = found["gap"], found["speedup"]
    if gap is None or gap["status"] != "ok":
        if speedup is None:
            console.print(f"gap: {'none' if gap is None else gap['status']}")
    else:
        console.print(
            f"gap {gap['gap']:.4f} ± {gap['standard_error']:.4f} = (L_sgd − L_adam) / (L_init − "
            f"L_adam), L_sgd {gap['sgd_loss']:.4g} at rate {gap['sgd_lr']:.3g}, L_adam "
            f"{gap['adam_loss']:.4g} at {gap['adam_lr']:.3g}, L_init {gap['init_loss']:.4g}"
        )
    for run in found["training"]:
        best = gap is not None and run["lr"] == gap[BEST_RATES[run["optimizer"]]]
        if best and run["seed"] > 0:
            line = f"seed {run['seed']}: loss {run['loss']:.4g} after {run['step']} steps"
            console.print(f"  {run['optimizer']} at {run['lr']:.3g}, {line}")
    if speedup is not None and speedup["status"] != "ok":
        console.print(f"log2 speed-up: {speedup['status']}, {speedup['reason']}")
    elif speedup is not None:
        console.print(
            f"log2 speed-up {_speedup(speedup)}: {speedup['num_trials']} trials, at T = "
            f"{speedup['num_steps']} steps SGD {speedup['sgd_loss']:.4g} at rate "
            f"{speedup['sgd_lr']:.3g}, AdamW {speedup['adam_loss']:.4g} at {speedup['adam_lr']:.3g}"
        )
    for trial in found["trials"]:
        if speedup is not None and trial["lr"] == speedup[BEST_RATES[trial["optimizer"]]]:
            loss = "diverged" if trial["final_loss"] is None else f"loss {trial['final_loss']:.4g}"
            line = f"seed {trial['seed']}: {loss} after {trial['num_steps']} steps"
            console.print(f"  {trial['optimizer']} at {trial['lr']:.3g}, {line}")
    for row in found["measurements"]:
        error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.4f}"
        value = "–" if row["corrected"] is None else f"{row['corrected']:.4f}"
        name = f"{row['metric']} ({row['scale']}, σ {row['sigma']:g})"
        console.print(f"{name} {value}{error}, {_place(row)}")
    for row in found["spectra"]:
        counts = f"{row['blocks']} blocks, {row['probes']} probes, {row['rows']} rows"
        checkpoint = row["checkpoint_sha256"]
        weights = "" if checkpoint is None else f", checkpoint {checkpoint}"
        made = f"run {row['run_id']}, batch {row['batch_hash']}{weights}"
        console.print(f"spectra, {_place(row)}: {counts}; {made}")
    for source in dict.fromkeys(row["data_source"] for row in found["spectra"]):
        console.print(f"data: {source}")
    labels = [("code_version", "code"), ("torch_version", "torch"), ("device", "on")]
    for run in found["runs"]:
        facts = ", ".join(f"{label} {run[name]}" for name, label in labels)
        seeds = ", ".join(map(str, run["seeds"]))
        console.print(f"run {run['run_id']}: {facts}, seeds {seeds}, {run['started'][:16]}")
    for command in dict.fromkeys(run["command"] for run in found["runs"]):
        console.print(f"by: {command}")
    for path, sha256 in found["files"].items():
        console.print(f"file {path}: sha256 {sha256}")
    console.print(f"recompute a sample of the rows: harness verify {model['model']}")


def _place(row: Mapping[str, Any]) -> str:
    """Say where the spectrum behind a row was taken."""
    return f"at {row['stage']}, seed {row['init_seed']}, partition {row['partition']}"


def cost_line(num_probes: int, num_steps: int, cost: Forecast) -> str:
    """Return the forecast of one spectrum in a line."""
    some = f"{cost.num_gram} block{'s' * (cost.num_gram > 1)}"
    exact = f"{some} by {cost.gram_passes:,} passes, " if cost.num_gram else ""
    return (
        f"forecast at {num_probes} probes × {num_steps} steps: {cost.num_products:,} products, "
        f"{exact}{cost.flops / 1e12:.3g} TFLOP, {cost.graph_bytes / 2**20:,.0f} MiB of kept graph"
    )


def estimate_line(metric: str, estimate: Estimate, truncation_error: float) -> str:
    """Return a metric with its errors in a line."""
    from spectra_db.jackknife import MIN_PROBES

    if estimate.corrected != estimate.corrected:  # nan: not known
        return f"{metric} {estimate.value:.4f} (plug-in; its error needs {MIN_PROBES} probes)"
    text = f"{metric} {estimate.corrected:.4f} ± {estimate.standard_error:.4f}"
    return text + (f" (last steps {truncation_error:.4f})" if truncation_error else "")
