"""The leaderboard in words: what docs, terminal and site say of table `leaderboard`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from harness.errors import UserError
from harness.leaderboard import classifier
from harness.leaderboard.statistics import DUMMIES, ENTERING_TIERS, REFERENCE, measurements
from harness.leaderboard.tables import Dataset, natural_key
from harness.training.gap import THRESHOLD
from spectra_db.densities import SCALES
from spectra_db.files import whole
from spectra_db.heterogeneity import LEADING, METRICS, is_leading
from spectra_db.words import STAGES

_NUM_MOVED = 3  # models that are named
BEGIN = "<!-- written by `make leaderboard` -->"
END = "<!-- end of what is written -->"
# What eigenvalues are divided by, where people read it.
SCALE_WORDS = {"none": "–"} | {name: scale.short for name, scale in SCALES.items()}
# What the authors' code compares: eigenvalues as they are.
RAW = (("js0", "raw"), ("js0_paper", "raw"))
LABELS = {
    **{name: metric.meaning for name, metric in METRICS.items()},
    "has_attention": "dummy: has attention",
    "num_params": "dummy: number of parameters",
}
COLUMNS = {
    "spearman": "Spearman",
    "kendall": "Kendall",
    "pearson_log": "Pearson (log)",
    "spearman_families": "between families",
    "partial_spearman": "given size",
    "auc": "AUC",
    "accuracy": "accuracy",
}


@dataclass(frozen=True)
class Cell:
    """A statistic with its interval; nan where not known."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.value != self.value:
            return "–"
        if self.low != self.low:
            return f"{self.value:.2f}".replace("-", "−")
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]".replace("-", "−")


def ranking(board: pd.DataFrame, stage: str = "init") -> list[dict[str, Any]]:
    """Return the readings of a stage, the best predictors first, each with its statistics.

    A metric's first reading, and JS⁰ of raw eigenvalues.

    Args:
        board: Table `leaderboard`.
        stage: A stage.

    Returns:
        Dicts of metric, scale, sigma, label, num_products, num_models, num_families, and a `Cell`
        per statistic, ordered by the size of Spearman's correlation.
    """
    rows = board[(board["stage"] == stage) & (board["left_out"] == "")]
    raw = pd.MultiIndex.from_frame(rows[["metric", "scale"]]).isin(RAW)
    rows = rows[is_leading(rows) | raw]
    table = []
    for (metric, scale, sigma), group in rows.groupby(["metric", "scale", "sigma"]):
        first = group.iloc[0]
        named = group.set_index("statistic")[["value", "ci_low", "ci_high"]]
        cells = {str(name): Cell(*map(float, row)) for name, row in named.iterrows()}
        label = LABELS.get(str(metric), str(metric))
        if scale != LEADING.get(str(metric), "none"):
            label = f"{label}, {scale}"
        reading = {"metric": metric, "scale": scale, "sigma": sigma, "label": label}
        reading["num_products"] = float(first["num_products"])
        counts = {name: int(first[name]) for name in ("num_models", "num_families")}
        table.append(reading | counts | cells)
    return sorted(table, key=lambda row: -abs(_known(row["spearman"].value)))


def sentences(board: pd.DataFrame, measured: pd.DataFrame) -> list[str]:
    """Say what can be said of protocol 1, in a few sentences; one says so if there are few models.

    Whether JS⁰ at initialisation predicts what Adam gains stays undecided whatever its correlation
    is: the gap is not of trained models, divides by what no training made, and is as much one of
    batch and budget.

    Args:
        board: Table `leaderboard`.
        measured: The `measurements` that it is of.
    """
    rows = {(row["metric"], row["scale"]): row for row in ranking(board)}
    js0 = rows.get(REFERENCE)
    if js0 is None or js0["spearman"].value != js0["spearman"].value:
        count = 0 if js0 is None else js0["num_models"]
        return [
            f"{count} trained models of the tiers {' and '.join(ENTERING_TIERS)} are too few for "
            "statistics."
        ]
    models = measured[measured["enters"] & (measured["stage"] == "init")]
    models = models.drop_duplicates("model").sort_values("model", key=lambda s: s.map(natural_key))
    return [
        "Undecided: whether JS⁰ at initialisation ranks models by what Adam gains over SGD can't "
        f"be told from these {js0['num_models']} models of {js0['num_families']} families. Their "
        "gap is taken after a few hundred steps, divides by the loss of an untrained model, and "
        "depends on batch and budget, of which JS⁰ knows nothing. Protocol 2 (docs/protocol.md) is "
        "made to decide it.",
        *_from_reference(models),
        _dummies(rows),
        *_stages(board),
        *_edges(models),
    ]


def answer(gap: Mapping[Any, Any]) -> str:
    """Say whether a model needs Adam by its gap from R, in a word or two of a row of `gaps`.

    A dash where older tables don't tell.
    """
    if pd.isna(gap["trained"]):
        return "–"
    return str(gap["adam_needed_now"]) if gap["trained"] else "not trained"


def docs_block(board: pd.DataFrame, data: Dataset) -> str:
    """Return what docs/leaderboard.md says of the tables, as Markdown.

    The sentences, the table of correlations, cheap measures, and how well they predict.
    """
    rows = ranking(board)
    head = ["measure at initialisation", "products per block", *COLUMNS.values()]
    lines = [
        [row["label"], f"{row['num_products']:.0f}", *(str(row[c]) for c in COLUMNS)]
        for row in rows
    ]
    measured = measurements(data.models, data.heterogeneity, data.gaps)
    said = "\n".join(f"- {sentence}" for sentence in sentences(board, measured))
    caption = "Correlations with the gap of protocol 1, 95 % intervals in brackets; data of "
    table = [_table(head, lines), f"{caption}{_day(data)}."] if rows else []
    return "\n\n".join([said, *table, *_predictions(rows, measured, _day(data))])


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown, numbers in all columns but the first."""
    first, *rest = ("| " + " | ".join(row) + " |" for row in (head, *rows))
    return "\n".join([first, "|---|" + "---:|" * (len(head) - 1), *rest])


def _day(data: Dataset) -> str:
    return "unknown date" if data.updated is None else f"{data.updated:%Y-%m-%d}"


def _predictions(rows: list[dict[str, Any]], measured: pd.DataFrame, day: str) -> list[str]:
    """Say how cheap measures compare with JS⁰, and how well they predict other families."""
    named = {(row["metric"], row["scale"]): row for row in rows}
    paragraphs = []
    if REFERENCE in named:
        paragraphs.append(_cheap(named, named[REFERENCE]["num_products"]))
    head = ["measures", "accuracy", "the majority's answer", "clear intervals", "of them right"]
    lines: list[list[str]] = []
    skill, most, families = False, 0, 0
    for label, names in (
        ("spreads of gradient, rms eigenvalue and trace", classifier.CHEAP),
        ("with JS⁰", classifier.WITH_JS0),
    ):
        examples = classifier.Examples.of(measured, names)
        test = classifier.summary(classifier.held_out(examples))
        if not test["num_models"]:
            continue
        skill = skill or test["accuracy"] > test["majority"]
        most = max(most, int(test["num_models"]))
        families = max(families, len(set(examples.families)))
        cells = [label, f"{test['accuracy']:.0%}", f"{test['majority']:.0%}"]
        lines.append([*cells, str(test["num_clear"]), str(test["clear_correct"])])
    verdict = "A rule that is more often right than the majority's answer may give a clear answer."
    if not skill:
        verdict = (
            "So there is no skill yet, and every answer on these data is “unclear”; what remains "
            "useful is the place among the models."
        )
    if not most:
        return [*paragraphs, "No model can be predicted from other families yet."]
    return [
        *paragraphs,
        f"Each of {most} models of {families} families predicted from the other families, data of "
        f"{day}:",
        _table(head, lines),
        verdict,
    ]


def write_part(path: Path, text: str) -> None:
    """Put a text between the markers of a file.

    Raises:
        UserError: The file can't be read or has no markers.
    """
    try:
        page = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} can't be read: it is no UTF-8 text") from error
    if not (page.count(BEGIN) == page.count(END) == 1 and page.index(BEGIN) < page.index(END)):
        raise UserError(f"{path} needs a line '{BEGIN}' and after it a line '{END}'")
    before, after = page[: page.index(BEGIN)], page[page.index(END) :]
    with whole(path) as part:
        part.write_text(f"{before}{BEGIN}\n\n{text}\n\n{after}", encoding="utf-8")


def _from_reference(models: pd.DataFrame) -> list[str]:
    """Say how many models count as trained, and what the gap from R says of them."""
    known = models[models["trained"].notna()]
    if known.empty:
        return []
    answers = known.apply(answer, axis=1)
    counts = answers.value_counts()
    trained, untrained = known[answers != "not trained"], known[answers == "not trained"]
    names = f" (not: {', '.join(untrained['model'])})" if len(untrained) else ""
    said = (
        f"{len(trained)} of {len(known)} count as trained: AdamW ends a tenth below R, the loss of "
        f"having learnt nothing, in every seed{names}. Measured from R, the 95 % interval of the "
        f"gap is above 0.1 in {counts.get('yes', 0)} (Adam needed), below in {counts.get('no', 0)} "
        f"(not needed), and holds 0.1 in {counts.get('unclear', 0)} (unclear)."
    )
    moved = trained.assign(by=(trained["gap_from_reference"] - trained["gap"]).abs())
    moved = moved[moved["by"] >= THRESHOLD].nlargest(_NUM_MOVED, "by")
    pairs = zip(moved["model"], moved["gap"], moved["gap_from_reference"], strict=True)
    moves = [f"{model} (from {old:.3f} to {new:.2f})" for model, old, new in pairs]
    if moves:
        said += f" It moves most in {', '.join(moves)}."
    return [said.replace(" -", " −")]


def _dummies(rows: dict[tuple[str, str], Any]) -> str:
    """Say how JS⁰ stands against what needs no spectrum."""
    parts = []
    for row in (rows.get((metric, "none")) for metric in DUMMIES):
        if row is not None and row["spearman"].value == row["spearman"].value:
            gain = row["advantage"]
            outcome = "weaker" if gain.high < 0 else "stronger" if gain.low > 0 else "not apart"
            parts.append(f"{row['label'].partition(': ')[2]} {gain}, {outcome}")
    return f"To be beaten by any measure (|ρ| less that of JS⁰): {'; '.join(parts)}."


def _cheap(rows: dict[tuple[str, str], Any], reference: float) -> str:
    """Say whether measures for less than a tenth of JS⁰'s products predict as well."""
    parts = []
    for row in sorted(rows.values(), key=lambda row: row["num_products"]):
        if row["metric"] in (REFERENCE[0], *DUMMIES) or row["num_products"] > reference / 10:
            continue
        price = "no products" if row["num_products"] == 0 else f"{row['num_products']:.0f} products"
        gain = row["advantage"]
        outcome = "no significant difference"
        if gain.low > 0 or gain.high < 0:
            outcome = "better" if gain.low > 0 else "worse"
        parts.append(f"{row['label']} ({price}) {gain}, {outcome}")
    if not parts:
        return "No measure for a tenth of the products of JS⁰ is in the data."
    return (
        f"How much stronger the correlation of cheaper measures is than that of JS⁰ "
        f"({reference:.0f} products per block), as difference of |ρ|: {'; '.join(parts)}."
    )


def _stages(board: pd.DataFrame) -> list[str]:
    """Say how JS⁰ changes in training."""
    of_js0 = board[(board["metric"] == REFERENCE[0]) & (board["scale"] == REFERENCE[1])]
    parts, sizes = [], set()
    for stage in STAGES[1:]:
        row = of_js0[(of_js0["stage"] == stage) & (of_js0["statistic"] == "ratio_to_init")]
        if len(row) and row["value"].notna().all():
            first = row.iloc[0]
            parts.append(f"{Cell(first['value'], first['ci_low'], first['ci_high'])} at {stage}")
            sizes.add(int(first["num_models"]))
    if not parts:
        return []
    count = "–".join(str(size) for size in sorted({min(sizes), max(sizes)}))
    return [
        "In training under AdamW JS⁰ is, relative to initialisation (geometric mean over "
        f"{count} models), {', '.join(parts)}."
    ]


def _edges(models: pd.DataFrame) -> list[str]:
    """Name the models whose best learning rate is at the edge of its grid, or that have none."""
    edge = models.loc[models["at_edge"].astype(bool), "model"]
    if edge.empty:
        return []
    text = (
        f"In {len(edge)} of {len(models)} models a best learning rate is at the edge of its grid, "
        f"so that a wider one could change the gap: {', '.join(edge)}."
    )
    lost = models.loc[models["sgd_loss"] >= models["init_loss"], "model"]
    if len(lost):
        text += (
            f" In {', '.join(lost)} SGD diverged at every rate; its final loss counts as the "
            "initial one, and the gap is 1 by definition."
        )
    return [text]


def _known(value: float) -> float:
    return value if value == value else 0.0
