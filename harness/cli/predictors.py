"""The command that measures untrained models: predictors."""

from __future__ import annotations

from pathlib import Path

import click

from harness.cli.base import device_of, main, options


@main.command()
@click.argument("models", nargs=-1, required=True)
@options("registry", "data_root", "out", "device", "log")
def predictors(
    models: tuple[str, ...],
    registry: Path | None,
    data_root: Path | None,
    out: Path,
    device: str | None,
    log: Path | None,
) -> None:
    """Measure what may predict Adam's gain: untrained models, for three initialisations.

    Those that follow from a spectrum read the spectra at init that --out holds, of seeds 1 to 3;
    what is missing of them is pending, until the same command finds it. docs/predictors.md says
    what each is.
    """
    from harness import registry as catalogue
    from harness.campaign.claims import claim_or_refuse
    from harness.campaign.unit import Unit
    from harness.cli.progress import progress_bar
    from harness.predictors.take import take
    from harness.records import version
    from harness.records.ledger import Ledger
    from harness.records.provenance import command_line

    entries = [catalogue.get(name, registry_dir=registry) for name in dict.fromkeys(models)]
    for entry in entries:
        version.check(entry, Ledger(out))
    for entry in entries:
        unit = Unit(entry.name, "predictors", stage="init")
        with (
            claim_or_refuse(out, unit),
            progress_bar(f"{entry.name} predictors", log=log) as on_progress,
        ):
            rows = take(
                entry, data_root, out, device_of(device), on_progress, command=command_line()
            )
        counts = rows["status"].value_counts()
        said = ", ".join(f"{n} {status}" for status, n in counts.items())
        click.echo(f"{entry.name}: {said}, {rows['unstable'].eq(True).sum()} unstable; in {out}")
