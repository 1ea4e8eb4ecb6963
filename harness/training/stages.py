"""Stages: where on the AdamW run a checkpoint is taken, and where it lies.

That is `CHECKPOINT_DIR/MODEL/adamw-seedS/STAGE.safetensors`.
"""

from __future__ import annotations

from pathlib import Path

from spectra_db.words import FRACTIONS

# The run whose stages are kept; it also seeds their initialisation and their probes.
STAGE_SEED = 1


def stage_steps(stages: tuple[str, ...], num_steps: int) -> dict[str, int]:
    """Return the number of updates made at each stage.

    >>> stage_steps(("init", "p25", "final"), 60)
    {'init': 0, 'p25': 15, 'final': 60}

    Raises:
        ValueError: a stage that is not one of init, p10, p25, p50, final.
    """
    unknown = [stage for stage in stages if stage not in FRACTIONS]
    if unknown:
        raise ValueError(f"unknown stage {unknown[0]!r}; the stages are {', '.join(FRACTIONS)}")
    return {stage: round(FRACTIONS[stage] * num_steps) for stage in stages}


def run_name(seed: int) -> str:
    """Name the training run whose stages are used: AdamW at the best rate, this seed."""
    return f"adamw-seed{seed}"


def folder_of(checkpoint_dir: Path | str, model: str, seed: int) -> Path:
    """Return the folder of the stages of a run."""
    return Path(checkpoint_dir) / model / run_name(seed)


def file_name(stage: str) -> str:
    """Return the name of a stage's checkpoint."""
    return f"{stage}.safetensors"


def checkpoint_path(checkpoint_dir: Path | str, model: str, seed: int, stage: str) -> Path:
    """Return where the checkpoint of a stage lies."""
    return folder_of(checkpoint_dir, model, seed) / file_name(stage)


def out_option(checkpoint_dir: Path | str | None) -> str:
    """Return the option by which a command leaves its stages there, or a place for one's own.

    >>> out_option("out/checkpoints")
    '--out out'
    """
    folder = Path("OUT/checkpoints" if checkpoint_dir is None else checkpoint_dir)
    return f"--out {folder.parent if folder.name == 'checkpoints' else 'OUT'}"
