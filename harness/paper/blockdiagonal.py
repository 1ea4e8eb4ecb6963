"""Figure 2: is the Hessian nearly block diagonal? Exactly on tiny models, by products on others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from harness import tasks
from harness.estimator import Block, find_blocks
from harness.estimator.checks import fixed_arithmetic
from harness.estimator.probes import draw_probe, probe_seed
from harness.paper.drawing import heat_map, panels
from harness.paper.quadratic import Array
from harness.paper.release import Source
from harness.paper.result import Result
from harness.records.ledger import Ledger
from harness.registry import get
from harness.training import Problem, load_problem
from harness.training.stages import STAGE_SEED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEPTHS = (2, 4, 8)
WIDTH, HEADS, CONTEXT = 4, 2, 2
# Steps of AdamW between the two Hessians of a tiny Transformer.
NUM_STEPS = 500
NUM_SEQUENCES = 256
# More at once take memory and are no faster.
ROWS_AT_ONCE = 32
STARTS = ("N(0, 0.02²)", "torch's")

NUM_PROBES = 10
MODELS = (
    "mlp-mnist",
    "vgg4-mnist",
    "resnet8-cifar10",
    "gpt-2x64-shakespeare",
    "vit-cifar10",
    "mixer-mnist",
)
STAGES = ("init", "final")


class TinyTransformer(nn.Module):
    """The paper's: no norms, no biases, a perceptron as narrow as the stream.

    Args:
        vocab_size: Size of the vocabulary.
        num_layers: Number of layers.
        gpt_init: Weights of N(0, 0.02²), as GPT-2's and the authors' code; else as torch draws
            them, U(−½, ½) at this width.
    """

    def __init__(self, vocab_size: int, num_layers: int, *, gpt_init: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, WIDTH)
        self.position = nn.Parameter(torch.randn(CONTEXT, WIDTH))
        names = ("query", "key", "value", "projection", "up", "down")
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH, bias=False) for name in names})
            for _ in range(num_layers)
        )
        self.head = nn.Linear(WIDTH, vocab_size, bias=False)
        if gpt_init:
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.02)

    def stack(self) -> list[nn.ModuleDict]:
        """Return the layers."""
        return [layer for layer in self.layers if isinstance(layer, nn.ModuleDict)]

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, V)
        """Return logits."""
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        for layer in self.stack():
            q, k, v = (
                layer[name](x).unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2)
                for name in ("query", "key", "value")
            )
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + layer["projection"](y.transpose(1, 2).flatten(2))
            x = x + layer["down"](F.gelu(layer["up"](x)))
        return self.head(x)


# The paper's groups of a layer.
GROUPS = {"QK": ("query", "key"), "VP": ("value", "projection"), "MLP": ("up", "down")}


def tiny_hessian(model: TinyTransformer, tokens: Tensor, targets: Tensor) -> Array:
    """Return the exact Hessian with respect to all layers, ordered by layer and group.

    Args:
        model: In float64.
        tokens: Inputs, shape (B, T).
        targets: Next tokens, shape (B, T).

    Returns:
        Shape (n, n), n = 96 per layer.
    """
    parameters = [
        layer[name].get_parameter("weight")
        for layer in model.stack()
        for names in GROUPS.values()
        for name in names
    ]
    with fixed_arithmetic(model):
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        grads = torch.autograd.grad(loss, parameters, create_graph=True)
        g = torch.cat([x.flatten() for x in grads])
        rows = []
        for directions in torch.eye(len(g), dtype=g.dtype).split(ROWS_AT_ONCE):
            found = torch.autograd.grad(
                g, parameters, directions, retain_graph=True, is_grads_batched=True
            )
            rows.append(torch.cat([x.flatten(1) for x in found], dim=1))
    H = torch.cat(rows)
    return np.asarray((H + H.T).numpy() / 2)


def mean_absolute(hessian: Array, group_size: int = 2 * WIDTH * WIDTH) -> Array:
    """Return the mean absolute entry of each block of groups, shape (G, G)."""
    count = len(hessian) // group_size
    return np.abs(hessian).reshape(count, group_size, count, group_size).mean((1, 3))


def fig2(source: Source) -> Result:
    """Compute the exact Hessians of the tiny Transformers, before and after training."""
    task = tasks.get("pydoc", context=CONTEXT)
    data = task.load()
    values: dict[str, Any] = {}
    matrices = {}
    for depth in DEPTHS:
        for start in STARTS:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = TinyTransformer(
                    data.model_options["vocab_size"], depth, gpt_init=start == STARTS[0]
                )
            batch = task.fixed(data, "train", NUM_SEQUENCES)
            stream = task.batches(data, 64, torch.Generator().manual_seed(0))
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
            for stage in ("at the start", "trained"):
                matrix = mean_absolute(tiny_hessian(model.double(), *batch))
                model.float()
                matrices[depth, f"{start}, {stage}"] = matrix
                values[f"{depth} layers, {start}, {stage}"] = _contrast(matrix)
                for _ in range(NUM_STEPS if stage == "at the start" else 0):
                    optimizer.zero_grad()
                    task.loss(model, next(stream)).backward()
                    optimizer.step()
    return Result(values, {"fig2": _draw_tiny(matrices)})


def _contrast(matrix: Array) -> dict[str, float]:
    """Compare the diagonal blocks with the others; 1 would be no structure at all."""
    diagonal = np.diag(matrix)
    off = ~np.eye(len(matrix), dtype=bool)
    # What a block would have if H were u uᵀ: as large as its row and its column allow.
    scaled = matrix / np.sqrt(np.outer(diagonal, diagonal))
    between = scaled[off]
    return {
        "diagonal_over_others": float(diagonal.mean() / matrix[off].mean()),
        "median_scaled": float(np.median(between)),
        "largest_scaled": float(between.max()),
    }


def units(source: Source) -> list[str]:
    """List the spectra to measure: all models at init, and at the end where trained weights lie."""
    return [
        f"{model}-{stage}"
        for model in MODELS
        for stage in STAGES
        if stage == "init" or _ledger(source).checkpoint(model, stage, STAGE_SEED).is_file()
    ]


def forecast(todo: Sequence[str], data_root: Path | None) -> str:
    """Say what the units cost."""
    products = 0
    for unit in todo:
        model, _, _ = unit.rpartition("-")
        problem = load_problem(get(model), data_root=data_root)
        products += NUM_PROBES * len(find_blocks(problem.model))
    return f"{products:,} products of whole Hessians, 0.05 to 0.3 s each on a core"


def measure(unit: str, source: Source, data_root: Path | None) -> dict[str, Any]:
    """Measure the block norms of one model at a stage."""
    name, _, stage = unit.rpartition("-")
    folder = None if stage == "init" else _ledger(source).checkpoints
    problem = load_problem(get(name), stage, data_root=data_root, checkpoint_dir=folder)
    blocks = find_blocks(problem.model)
    squares = squared_norms(problem, blocks, num_probes=NUM_PROBES)
    ratios, errors = coupling(squares)
    share, share_error = diagonal_share(squares)
    return {
        "model": name,
        "stage": stage,
        "blocks": [b.name for b in blocks],
        "coupling": ratios.tolist(),
        "coupling_error": errors.tolist(),
        "diagonal_share": share,
        "diagonal_share_error": share_error,
    }


def squared_norms(problem: Problem, blocks: Sequence[Block], *, num_probes: int) -> Array:
    """Estimate ‖H_kl‖_F² for all pairs of blocks by products with random vectors.

    For v Gaussian on block l alone, (H v)_k = H_kl v_l, and E ‖H_kl v_l‖² = ‖H_kl‖_F²: one product
    with the whole Hessian gives a column of blocks. Nothing of size n² is formed.

    Returns:
        Per probe and pair the squared norm of (H v_l)_k, shape (P, K, K).
    """
    model = problem.model
    named = dict(model.named_parameters())
    names = list(dict.fromkeys(part.parameter for b in blocks for part in b.parts))
    parameters = [named[name] for name in names]
    total = np.zeros((num_probes, len(blocks), len(blocks)))
    with fixed_arithmetic(model):
        columns: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        for batch in problem.batches:
            terms = problem.task.num_terms(batch)
            loss = problem.loss_fn(model, batch) * (terms / problem.num_terms)
            grads = torch.autograd.grad(loss, parameters, create_graph=True)
            by_name = dict(zip(names, grads, strict=True))
            for column, block in enumerate(blocks):
                for probe in range(num_probes):
                    seed = probe_seed(0, problem.entry.name, problem.stage, block.name, probe)
                    v = draw_probe(block.num_params, seed, "gaussian")
                    # Normed to √n: still ‖H_kl‖_F² in the mean, with less variance.
                    v = v * (block.num_params**0.5 / v.norm())
                    outputs = [part.of(by_name[part.parameter]) for part in block.parts]
                    pieces = v.split([x.numel() for x in outputs])
                    shaped = [p.view(x.shape) for p, x in zip(pieces, outputs, strict=True)]
                    products = torch.autograd.grad(
                        outputs, parameters, shaped, retain_graph=True, materialize_grads=True
                    )
                    so_far = columns.get((probe, column))
                    if so_far is not None:
                        products = tuple(map(torch.add, products, so_far))
                    columns[probe, column] = products
        for (probe, column), found in columns.items():
            by_name = dict(zip(names, found, strict=True))
            for row, block in enumerate(blocks):
                parts = [part.of(by_name[part.parameter]) for part in block.parts]
                total[probe, row, column] = sum(float(p.double().square().sum()) for p in parts)
    return total


def coupling(squares: Array) -> tuple[Array, Array]:
    """Return ‖H_kl‖_F / √(‖H_kk‖_F ‖H_ll‖_F) for all pairs, and the standard errors.

    The two estimates of a pair, H_kl and H_lk, are averaged. The error is the jackknife's over
    probes. A block that is exactly zero couples to none.

    Args:
        squares: From `squared_norms`, shape (P, K, K).
    """

    def ratio(mean: Array) -> Array:
        norms = np.sqrt((mean + mean.T) / 2)
        diagonal = np.diag(norms)
        size = np.sqrt(np.outer(diagonal, diagonal))
        return np.divide(norms, size, out=np.zeros_like(norms), where=size > 0)

    return _jackknife(squares, ratio)


def diagonal_share(squares: Array) -> tuple[float, float]:
    """Return the share of ‖H‖_F² that lies in the diagonal blocks, and its standard error."""
    value, error = _jackknife(squares, lambda mean: np.asarray(np.trace(mean) / mean.sum()))
    return float(value), float(error)


def _jackknife(squares: Array, statistic: Any) -> tuple[Array, Array]:
    count = len(squares)
    left_out = np.array([statistic(np.delete(squares, i, 0).mean(0)) for i in range(count)])
    spread = ((left_out - left_out.mean(0)) ** 2).sum(0)
    return statistic(squares.mean(0)), np.sqrt((count - 1) / count * spread)


def summarise(records: Mapping[str, dict[str, Any]], source: Source) -> Result:
    """Summarise the measured models."""
    values: dict[str, Any] = {}
    for unit, record in records.items():
        matrix, errors = np.array(record["coupling"]), np.array(record["coupling_error"])
        upper = np.triu_indices(len(matrix), 1)
        worst = int(matrix[upper].argmax())
        k, l = upper[0][worst], upper[1][worst]  # noqa: E741
        values[unit] = {
            "num_blocks": len(matrix),
            "median": float(np.median(matrix[upper])),
            "largest": float(matrix[k, l]),
            "largest_error": float(errors[k, l]),
            "largest_pair": [record["blocks"][k], record["blocks"][l]],
            "share_above_half": float((matrix[upper] > 0.5).mean()),
            "diagonal_share": record["diagonal_share"],
            "diagonal_share_error": record["diagonal_share_error"],
        }
    missing = [f"{model} at {stage}" for model in MODELS for stage in STAGES
               if f"{model}-{stage}" not in records]  # fmt: skip
    figures = {"blockdiagonal": _draw_coupling(records)} if records else {}
    return Result({"models": values} if values else {}, figures, tuple(missing))


def _ledger(source: Source) -> Ledger:
    return Ledger(Path(source or "."))


def _draw_tiny(matrices: Mapping[tuple[int, str], Array]) -> Figure:
    from matplotlib.colors import LogNorm

    rows = list(dict.fromkeys(name for _, name in matrices))
    figure, axes = panels(2.8 * len(rows), len(rows), len(DEPTHS), width=9.6)
    for (depth, name), matrix in matrices.items():
        ax = axes.reshape(len(rows), -1)[rows.index(name), DEPTHS.index(depth)]
        top = matrix.max()
        image = ax.imshow(matrix, cmap="cividis", norm=LogNorm(top / 1e4, top))
        ax.set_title(f"{depth} layers, {name}", fontsize=9)
        every = depth == DEPTHS[0]
        ticks = range(0, len(matrix), 1 if every else 3)
        labels = [f"{i // 3} {list(GROUPS)[i % 3]}" if every else f"{i // 3}" for i in ticks]
        ax.set_xticks(ticks, labels, fontsize=8, rotation=90 if every else 0)
        ax.set_yticks(ticks, labels, fontsize=8)
        figure.colorbar(image, ax=ax, shrink=0.8)
    figure.supxlabel("layer (groups QK, VP, MLP); colour: mean |entry| of H", fontsize=9)
    return figure


def _draw_coupling(records: Mapping[str, dict[str, Any]]) -> Figure:
    from matplotlib.colors import LogNorm

    models = [m for m in MODELS if any(f"{m}-{s}" in records for s in STAGES)]
    figure, axes = panels(5.4, 2, len(models), width=2.5 * len(models) + 0.8)
    columns = axes.reshape(2, -1).T
    for model, column in zip(models, columns, strict=True):
        for stage, ax in zip(STAGES, column, strict=True):
            record = records.get(f"{model}-{stage}")
            if record is None:
                ax.set_axis_off()
                ax.text(0.5, 0.5, "not measured", ha="center", transform=ax.transAxes, fontsize=8)
                continue
            image = heat_map(ax, record["coupling"], norm=LogNorm(0.1, 100))
            share = f"{record['diagonal_share']:.0%} in the diagonal blocks"
            ax.set_title(f"{model}, {stage}\n{share}", fontsize=8)
            ax.tick_params(labelsize=7)
    label = "‖H_kl‖ / √(‖H_kk‖ ‖H_ll‖)"
    figure.colorbar(image, ax=list(columns[-1]), label=label, shrink=0.7)
    figure.supxlabel("block", fontsize=9)
    return figure
