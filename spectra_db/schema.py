"""The tables of the dataset: one Arrow schema each, with the meaning and unit of every column.

docs/protocol.md defines what the numbers mean.
"""

from __future__ import annotations

import pyarrow as pa

from spectra_db.words import ANSWERS, PARTITIONS, STAGES, TIERS, listed

PROTOCOL_VERSION = 1
# Of tables that have a protocol of their own: the comparison of SGD and AdamW is of the second;
# metrics are of the fourth, whose rules are continued and which states more truncation.
VERSIONS = {"heterogeneity": 4, "trials": 2, "speedups": 2, "predictors": 2}
# Earlier versions that are read, too.
EARLIER = {"heterogeneity": (1, 2, 3)}

_TEXT, _INT, _INT32, _FLOAT, _BOOL = pa.string(), pa.int64(), pa.int32(), pa.float64(), pa.bool_()
_LIST = pa.list_(_FLOAT)


def _column(
    name: str,
    kind: pa.DataType,
    description: str,
    unit: str = "",
    *,
    optional: bool = False,
    since: str = "",
) -> pa.Field:
    """Describe one column; `optional` ones may be null, as those are that older releases lack."""
    metadata = {"description": description, "unit": unit, "since": since}
    metadata = {key: text for key, text in metadata.items() if text}
    return pa.field(name, kind, nullable=optional or bool(since), metadata=metadata)


_MODEL = _column("model", _TEXT, "Name of the registry entry")
_STAGE = _column("stage", _TEXT, f"Stage of training: {listed(STAGES)}")
_INIT_SEED = _column("init_seed", _INT, "Seed of the model's initialisation")
_TRAIN_RUN = _column("train_run", _TEXT, "Training run of the stage, empty at initialisation")
_POINT = (_MODEL, _STAGE, _INIT_SEED, _TRAIN_RUN)
_PARTITION = _column(
    "partition",
    _TEXT,
    f"How parameters form blocks: {listed((*PARTITIONS, 'custom'))}, as a caller chose them",
)
_BLOCK = _column("block", _TEXT, "Name of the block: its parameter's, [q], [k], [v] for a slice")
_KIND = _column("kind", _TEXT, "Role of the block's parameters: embedding, query, conv, ...")
_NUM_PARAMS = _column("num_params", _INT, "Number of parameters", "parameters")
_PROTOCOL = _column("protocol_version", _INT32, "Version of the protocol that the row follows")
_OUTCOME = (
    _column("status", _TEXT, "ok, zero (exactly zero block), pending or failed"),
    _column("reason", _TEXT, "Why the status is not ok", optional=True),
)
_OPTIMIZER = _column("optimizer", _TEXT, "sgd or adamw")
_LR = _column("lr", _FLOAT, "Peak learning rate")
_SEED = _column("seed", _INT, "Seed of initialisation and data order of the training run")
_STEP = _column("step", _INT, "Number of optimizer steps taken", "steps")
_RUN_ID = _column("run_id", _TEXT, "Run that made the row, in table runs")
_CODE = (
    _column("code_version", _TEXT, "Version and commit of the code"),
    _column("torch_version", _TEXT, "Version of torch"),
    _column("device", _TEXT, "Device"),
    _column("num_threads", _INT, "Threads of torch"),
)


def _float(name: str, description: str, unit: str = "") -> pa.Field:
    return _column(name, _FLOAT, description, unit, optional=True)


_LOSS = "mean loss"
_CURVATURE = "loss per squared parameter"

# Of table `gaps`: measured from the loss of having learnt nothing, where AdamW learnt something.
_FROM_REFERENCE = [
    _column(name, kind, description, unit, since="0.10.0")
    for name, kind, description, unit in (
        ("target_entropy", _FLOAT, "H: entropy of the targets' marginal, in nats", _LOSS),
        ("reference_loss", _FLOAT, "R: mean loss of having learnt nothing, min(init, H)", _LOSS),
        ("trained", _BOOL, "AdamW gained a tenth of R in each seed", ""),
        ("gap_from_reference", _FLOAT, "(min(S, R) - A) / (R - A), only where trained", ""),
        ("gap_from_reference_error", _FLOAT, "Standard error of gap_from_reference", ""),
        ("gap_from_reference_low", _FLOAT, "Lower end of its 95 % interval", ""),
        ("gap_from_reference_high", _FLOAT, "Upper end of its 95 % interval", ""),
        ("adam_needed_now", _TEXT, "yes: that interval is above 0.1; no: below; unclear", ""),
    )
]

_COLUMNS = {
    "models": [
        _MODEL,
        _column("family", _TEXT, "Family of architectures; statistics resample families"),
        _column("tier", _TEXT, listed(TIERS)),
        _column("task", _TEXT, "Data set and loss"),
        _NUM_PARAMS,
        _column("num_blocks", _INT, "Blocks of the entry's partition", "blocks"),
        _column("source", _TEXT, "Where the architecture comes from"),
        _column("licence", _TEXT, "Licence of the architecture's code"),
        _column("reference", _TEXT, "Paper or page that defines the architecture"),
        *_OUTCOME,
        _PROTOCOL,
    ],
    "spectra": [
        *_POINT,
        _PARTITION,
        _BLOCK,
        _column("operator", _TEXT, "What the spectrum is of: hessian"),
        _column("norm_mode", _TEXT, "eval: running statistics; train: batch statistics"),
        _column("dtype", _TEXT, "Arithmetic of the products"),
        _column("probe_distribution", _TEXT, "gaussian (normalised) or rademacher"),
        _column("batch_hash", _TEXT, "SHA-256 of the batch's tensors, 16 hex digits"),
        _PROTOCOL,
        _column("probe", _INT32, "Index of the probe; 0 for exact and zero blocks"),
        _RUN_ID,
        _STEP,
        _column("progress", _FLOAT, "Step over the steps of the whole run, 0 to 1"),
        _column("block_kind", _TEXT, "Role of the block's parameters: embedding, query, ..."),
        _NUM_PARAMS,
        _column("method", _TEXT, "slq, or exact for blocks that are diagonalised"),
        _column("probe_seed", _INT, "Seed of the probe's CPU generator; 0 if exact"),
        _column("num_steps", _INT32, "Lanczos steps taken, 0 if exact", "steps"),
        _column("reorthogonalized", _BOOL, "Full reorthogonalisation was on"),
        _column("breakdown", _BOOL, "Lanczos ended early: the rule is exact for this probe"),
        _column("alphas", _LIST, "Diagonal of the tridiagonal matrix T", _CURVATURE),
        _column("betas", _LIST, "Off-diagonal of T, the residual last", _CURVATURE),
        _column("nodes", _LIST, "Ritz values, or eigenvalues if exact, ascending", _CURVATURE),
        _column("weights", _LIST, "Weights of the nodes, sum 1"),
        _column("num_products", _INT, "Hessian-vector products of this row", "products"),
        _column("seconds", _FLOAT, "Wall time of this row", "s"),
        _column("peak_bytes", _INT, "Peak memory of the process or device", "B", optional=True),
        _column("microbatch_size", _INT, "Samples in the largest microbatch", "samples"),
        _column("batch_size", _INT, "Samples in the batch", "samples"),
        _column("num_terms", _INT, "Terms that the mean loss averages", "terms"),
        _column("data_source", _TEXT, "Where the batch's data come from, with a checksum"),
        _column("matmul_precision", _TEXT, "highest (float32), high (TF32), medium (bfloat16)"),
        _column("device", _TEXT, "Device of the products"),
        _float("tolerance", "Tolerance that was asked for"),
        _column(
            "product",
            _TEXT,
            "autograd, or differences of gradients; null: autograd",
            since="0.14.0",
        ),
        _column(
            "product_error", _FLOAT, "Relative error of differences, else null", since="0.14.0"
        ),
        *_OUTCOME,
    ],
    "blocks": [
        *_POINT,
        _BLOCK,
        _PROTOCOL,
        _KIND,
        _NUM_PARAMS,
        _float("weight_rms", "Root mean square of the block's parameters"),
        _float("gradient_rms", "Root mean square of the gradient on the Hessian's batch"),
        _float("trace", "Trace of the block's Hessian", _CURVATURE),
        _float("trace_error", "Standard error of the trace over probes", _CURVATURE),
        _float("frobenius", "Frobenius norm of the block's Hessian", _CURVATURE),
        _float("frobenius_error", "Standard error of the norm over probes", _CURVATURE),
        _float("lambda_max", "Largest Ritz value", _CURVATURE),
        _float("lambda_max_error", "Residual bound of the largest Ritz value", _CURVATURE),
        _float("lambda_min", "Smallest Ritz value", _CURVATURE),
        _float("lambda_min_error", "Residual bound of the smallest Ritz value", _CURVATURE),
    ],
    "heterogeneity": [
        *_POINT,
        _PARTITION,
        _column("metric", _TEXT, "js0, js0_paper, w1, lambda_rms_spread, ..."),
        _column("scale", _TEXT, "What eigenvalues are divided by: lambda10, raw, ...; or none"),
        _column("sigma", _FLOAT, "Width of the smoothing Gaussian, scaled; 0 if none"),
        _PROTOCOL,
        _float("value", "Plug-in estimate"),
        _float("corrected", "Estimate after the jackknife's bias correction"),
        _float("standard_error", "Jackknife standard error over probes"),
        _float("truncation_error", "What more steps may change, by what the last ones did"),
        _float("batch_error", "Difference between two halves of the batch"),
        _column("num_blocks", _INT, "Blocks that entered", "blocks"),
        _column("num_zero_blocks", _INT, "Exactly zero blocks left out", "blocks"),
        _column("num_products", _INT, "Hessian-vector products used", "products"),
        _column(
            "batch_size",
            _INT,
            "Samples in the batch; null before 0.3.0",
            "samples",
            since="0.3.0",
        ),
    ],
    "training": [
        _MODEL,
        _OPTIMIZER,
        _LR,
        _SEED,
        _STEP,
        _column("split", _TEXT, "batch, train (fixed subset) or test"),
        _column("metric", _TEXT, "loss or accuracy"),
        _PROTOCOL,
        _float("value", "Value of the metric", "mean loss, or fraction"),
        _column("diverged", _BOOL, "The run diverged"),
    ],
    "stages": [
        _MODEL,
        _STAGE,
        _OPTIMIZER,
        _SEED,
        _PROTOCOL,
        _STEP,
        _float("loss", "Loss on the fixed training subset", _LOSS),
        _float("metric", "Score on the test split, where the task has one", "fraction"),
        _LR,
        _column("checkpoint_sha256", _TEXT, "SHA-256 of the checkpoint's file"),
    ],
    "gaps": [
        _MODEL,
        _PROTOCOL,
        _float("gap", "(L_sgd - L_adam) / (L_init - L_adam)"),
        _float("standard_error", "Standard error of the gap over seeds"),
        _float("ci_low", "Lower end of the 95 % interval"),
        _float("ci_high", "Upper end of the 95 % interval"),
        _float("sgd_loss", "Mean final loss of SGD at its best rate", _LOSS),
        _float("adam_loss", "Mean final loss of AdamW at its best rate", _LOSS),
        _float("init_loss", "Mean loss at initialisation", _LOSS),
        _float("sgd_lr", "Best learning rate of SGD"),
        _float("adam_lr", "Best learning rate of AdamW"),
        _column("at_edge", _BOOL, "A best rate lies at the edge of its grid"),
        _column("num_lrs", _INT, "Learning rates tried per optimizer, the fewer of both"),
        _column("num_seeds", _INT, "Seeds averaged"),
        _column("adam_needed", _BOOL, "gap > 0.1 and > 2 standard errors", optional=True),
        *_FROM_REFERENCE,
        *_OUTCOME,
    ],
    "trials": [
        _MODEL,
        _OPTIMIZER,
        _column("num_steps", _INT, "Steps of the whole run: T, 2T or 4T", "steps"),
        _LR,
        _SEED,
        _PROTOCOL,
        _column("init_loss", _FLOAT, "Loss before the first step", _LOSS),
        _float("target_entropy", "Entropy of the targets' marginal, where they are classes"),
        _column("reference_loss", _FLOAT, "R: the loss of having learnt nothing", _LOSS),
        _float("final_loss", "Loss after the last step; null if it diverged", _LOSS),
        _float("accuracy", "Accuracy after the last step, where there is one", "fraction"),
        _column("diverged", _BOOL, "A loss was not finite, or ended above the first"),
        _column("eval_steps", pa.list_(_INT), "Steps at which the loss was taken", "steps"),
        _column("eval_losses", _LIST, "The losses on the fixed training subset", _LOSS),
        _column("batch_size", _INT, "Samples in a step's batch", "samples"),
        _column("data_source", _TEXT, "Where the data come from, with a checksum"),
        *_CODE,
        _column("seconds", _FLOAT, "Wall time of the run", "s"),
        _column("cpu_seconds", _FLOAT, "Processor time of the run", "s"),
    ],
    "speedups": [
        _MODEL,
        _PROTOCOL,
        _float("log2_speedup", "y: log2 of the steps that SGD needs for AdamW's loss, over T"),
        _float("standard_error", "Standard error of y over seeds, by the delta method"),
        _float("ci_low", "Lower end of the 95 % interval of y"),
        _float("ci_high", "Upper end of the 95 % interval of y; null where it is not bounded"),
        _column("censored", _BOOL, "The slower was not there in 4T steps", optional=True),
        _column("slower", _TEXT, "The optimizer behind: sgd or adamw", optional=True),
        _column("trained", _BOOL, "AdamW gained a tenth of R in each seed", optional=True),
        _column("adam_needed", _TEXT, f"Whether y > 0.5: {', '.join(ANSWERS)}", optional=True),
        _float("relative_gap", "y': (min(S, R) - A) / (R - A) at T steps"),
        _float("relative_gap_error", "Standard error of y' over seeds"),
        _float("sgd_loss", "S: mean loss of SGD after T steps", _LOSS),
        _float("adam_loss", "A: the same of AdamW", _LOSS),
        _float("init_loss", "I: mean loss before the first step", _LOSS),
        _float("reference_loss", "R: mean loss of having learnt nothing", _LOSS),
        _float("sgd_accuracy", "Accuracy of SGD after T steps", "fraction"),
        _float("adam_accuracy", "Accuracy of AdamW after T steps", "fraction"),
        _float("sgd_lr", "Best learning rate of SGD at T steps"),
        _float("adam_lr", "Best learning rate of AdamW at T steps"),
        _column("num_steps", _INT, "T", "steps"),
        _column("longest", _INT, "Steps of the longest run, over T: 1, 2 or 4"),
        _column("num_seeds", _INT, "Seeds averaged at T steps"),
        _column("num_trials", _INT, "Training runs behind the row"),
        *_OUTCOME,
    ],
    "predictors": [
        _MODEL,
        _INIT_SEED,
        _column("predictor", _TEXT, "Measure at initialisation, as in docs/predictors.md"),
        _PROTOCOL,
        _float("value", "The measure on the whole batch"),
        _float("first_half", "The same on the first half of the batch"),
        _float("second_half", "The same on the second half of the batch"),
        _column(
            "unstable",
            _BOOL,
            "The halves differ by more than 20 % of the value; null where there are none",
            optional=True,
        ),
        _float("standard_error", "Standard error of the value over probes"),
        _column("num_products", _INT, "Products with each block for the value", "products"),
        _column("num_full_products", _INT, "Products with the whole Hessian for it", "products"),
        _column("batch_size", _INT, "Samples in the whole batch", "samples"),
        _column("num_terms", _INT, "Terms that its mean loss averages", "terms"),
        _column("batch_hash", _TEXT, "SHA-256 of the batch's tensors, 16 hex digits"),
        _column("data_source", _TEXT, "Where the batch's data come from, with a checksum"),
        _column("seconds", _FLOAT, "Wall time of all that was measured with it", "s"),
        _RUN_ID,
        *_OUTCOME,
    ],
    "runs": [
        _MODEL,
        _RUN_ID,
        *_CODE,
        _column("seeds", pa.list_(_INT), "Seeds used"),
        _column("command", _TEXT, "Command line that repeats the run"),
        _column("started", pa.timestamp("us", tz="UTC"), "When the run started"),
        _PROTOCOL,
    ],
    "leaderboard": [
        _column("stage", _TEXT, "Stage of the metric"),
        _column("metric", _TEXT, "Measure of heterogeneity, as in table heterogeneity"),
        _column("scale", _TEXT, "Scale of the metric"),
        _column("sigma", _FLOAT, "Width of the smoothing, 0 if none"),
        _column("statistic", _TEXT, "spearman, kendall, pearson_log, accuracy, auc, ..."),
        _column("left_out", _TEXT, "Family that is left out, empty for none"),
        _PROTOCOL,
        _float("value", "Value of the statistic, null where too few models have it"),
        _float("ci_low", "Lower end of the 95 % bootstrap interval"),
        _float("ci_high", "Upper end of the 95 % bootstrap interval"),
        _column("num_models", _INT, "Models that entered", "models"),
        _column("num_families", _INT, "Families that entered", "families"),
        _float("num_products", "Median over models of the products per block", "products"),
    ],
}
TABLES = {table: pa.schema(columns) for table, columns in _COLUMNS.items()}

# What names a spectrum, and the lists of a quadrature rule with the recurrence behind it.
SPECTRUM = ("model", "stage", "init_seed", "train_run", "partition")
LISTS = ("alphas", "betas", "nodes", "weights")
# Of table `gaps`: which column names the learning rate that an optimizer is compared at.
BEST_RATES = {"sgd": "sgd_lr", "adamw": "adam_lr"}
KEYS: dict[str, tuple[str, ...]] = {
    "models": ("model", "protocol_version"),
    "spectra": (
        *SPECTRUM,
        *("block", "operator", "norm_mode", "dtype", "probe_distribution", "batch_hash"),
        *("protocol_version", "probe"),
    ),
    "blocks": ("model", "stage", "init_seed", "train_run", "block", "protocol_version"),
    # A row of a later protocol takes the place of the earlier one.
    "heterogeneity": (*SPECTRUM, "metric", "scale", "sigma"),
    "training": ("model", "optimizer", "lr", "seed", "step", "split", "metric", "protocol_version"),
    "stages": ("model", "stage", "optimizer", "seed", "protocol_version"),
    "gaps": ("model", "protocol_version"),
    "trials": ("model", "optimizer", "num_steps", "lr", "seed", "protocol_version"),
    "speedups": ("model", "protocol_version"),
    "predictors": ("model", "init_seed", "predictor", "protocol_version"),
    "runs": ("model", "run_id"),
    "leaderboard": (
        *("stage", "metric", "scale", "sigma", "statistic", "left_out"),
        "protocol_version",
    ),
}
