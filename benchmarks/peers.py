"""The same products by other ways: the paper's algorithm and four libraries. `make bench-peers`.

Each returns a function that takes one product with every block of partition `weights`; those of
`FULL` one product with the whole Hessian. PyHessian knows no blocks, and its density calls a
function that torch has no more: it is compared by a step of its trace, which is that product.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import Case, count_flops, entry, gpt_10m, resnet18
from harness import find_blocks
from harness.errors import UserError
from harness.estimator import shortcuts
from harness.estimator.checks import fixed_arithmetic
from harness.estimator.objective import Objective
from harness.estimator.operators import opened
from harness.estimator.settings import Settings

Step = Callable[[], object]
CASES = {"gpt-10m": gpt_10m, "resnet18": resnet18}


def ours(case: Case, partition: str = "weights", *, num_products: int = 30) -> Step:
    """What a spectrum of so many products a block takes: shortcuts where they pay."""
    blocks = find_blocks(case.model, partition)
    vectors = [torch.ones(b.num_params) for b in blocks]
    objective = Objective(case.model, case.loss_fn, [case.batch])
    with opened(objective, blocks, Settings(device="cpu", memory_budget=8 << 30)) as hessian:
        shortcuts.prepare(hessian, range(len(blocks)), num_products)
        if not hessian.shortcuts:
            hessian.products([])  # keeps the graph

    def step() -> None:
        with fixed_arithmetic(case.model):
            hessian.products(list(enumerate(vectors)))

    return step


def paper_algorithm(case: Case) -> Step:
    """Our implementation of what the paper's authors do (arXiv 2402.16788, appendix D).

    One backward pass with `create_graph` for all blocks, then for each block a whole second
    backward pass of ⟨gradient, v⟩, from which the block's part is taken.
    """
    parameters = _weights(case.model)

    def step() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            loss = case.loss_fn(case.model, case.batch)
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            for p in case.model.parameters():
                p.grad = None
            (gradient * torch.ones_like(gradient)).sum().backward(retain_graph=True)
            assert parameter.grad is not None

    return step


def curvlinops(case: Case) -> Step:
    """One operator per block, since the library shares nothing between blocks."""
    from curvlinops import HessianLinearOperator

    x, y = case.batch
    model = _flat(case.model)
    operators = [
        HessianLinearOperator(
            model,
            nn.CrossEntropyLoss(),
            [p],
            [(x, y.flatten())],
            check_deterministic=False,
            num_data=len(y.flatten()),
            batch_size_fn=len,
        )
        for p in _weights(case.model)
    ]

    def step() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            for operator in operators:
                operator @ torch.ones(operator.shape[1])

    return step


def hessian_eigenthings(case: Case) -> Step:
    """One operator per block by its parameter filter, over the same batch."""
    from hessian_eigenthings import HessianOperator

    operators = [
        HessianOperator(
            case.model,
            [case.batch],
            case.loss_fn,
            param_filter=lambda name, _, mine=block.name: name == mine,
        )
        for block in find_blocks(case.model)
    ]

    def step() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            for operator in operators:
                operator.matvec(torch.ones(operator.size))

    return step


def pyhessian(case: Case) -> Step:
    """A step of PyHessian's trace: one product of the whole Hessian with a vector of signs."""
    from pyhessian import hessian

    x, y = case.batch
    with sdpa_kernel(SDPBackend.MATH):
        whole = hessian(_flat(case.model), nn.CrossEntropyLoss(), data=(x, y.flatten()), cuda=False)
    return lambda: whole.trace(maxIter=1)


def jax_linearize(case: Case) -> Step:
    """A product linearized once for each block and compiled by XLA; of the GPT alone."""
    from benchmarks.jax_gpt import products

    compiled = products(case)
    return lambda: [product() for product in compiled]


BLOCKS = {
    "ours": ours,
    "ours, ordinary": partial(ours, num_products=1),
    "paper-algorithm": paper_algorithm,
    "curvlinops": curvlinops,
    "hessian-eigenthings": hessian_eigenthings,
    "jax.linearize + jit": jax_linearize,
}
FULL = {"ours, full": partial(ours, partition="full"), "pyhessian, full": pyhessian}
PEERS = BLOCKS | FULL


def _case(name: str) -> Case:
    """Return one of `CASES`, or that of a model of the registry.

    Raises:
        click.UsageError: There is no such model, or its data are not here.
    """
    try:
        return CASES[name]() if name in CASES else entry(name)
    except UserError as error:
        raise click.UsageError(str(error)) from None


def _flat(model: nn.Module) -> nn.Module:
    """Put the logits of all tokens in one dimension, as nn.CrossEntropyLoss wants them."""
    return nn.Sequential(model, nn.Flatten(0, -2)).eval()


def _weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of partition `weights`, none of them sliced."""
    parameters = dict(model.named_parameters())
    return [parameters[block.name] for block in find_blocks(model)]


def sgemm_rate(size: int = 2048, rounds: int = 5) -> float:
    """Return the GFLOP/s of torch's float32 product of two square matrices, the best of several.

    What a machine makes of these products moves with it: a step is mostly such.
    """
    a, b = torch.randn(2, size, size)
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds) / 1e9


@click.command()
@click.option(
    "--case", "names", multiple=True, help=f"{', '.join(CASES)} (default: both), or a model's name."
)
@click.option("--way", "ways", type=click.Choice(list(PEERS)), multiple=True, help="Default: all")
@click.option("--rounds", default=3, show_default=True, help="Steps of each way.")
def main(names: Sequence[str], ways: Sequence[str], rounds: int) -> None:
    """Time a step of each way, by turns, and print operations, the least of the times and sgemm's.

    Turns spread what else the machine does over all ways; the least of several times is the one
    that it disturbed least.
    """
    table = Table("case", "way")
    for column in ("GFLOP", "s", "CPU s", "time / ours", "CPU / ours"):
        table.add_column(column, justify="right")
    for name in names or CASES:
        asked = [way for way in ways or PEERS if PEERS[way] != jax_linearize or name == "gpt-10m"]
        if not asked:
            raise click.UsageError(f"JAX has no {name} here: pass --case gpt-10m")
        # Each beside ours on the same work, which is the first of its kind.
        base = {way: next(iter(kind)) for kind in (BLOCKS, FULL) for way in kind if way in asked}
        steps = {way: PEERS[way](_case(name)) for way in dict.fromkeys([*base.values(), *base])}
        flops = {way: count_flops(step) / 1e9 for way, step in steps.items()}  # also warms up
        times = {way: [] for way in steps}
        for _ in range(rounds):
            for way, step in steps.items():
                begin = time.perf_counter(), time.process_time()
                step()
                times[way].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
        least = {
            way: [min(kind) for kind in zip(*pairs, strict=True)] for way, pairs in times.items()
        }
        for way, (wall, cpu) in least.items():
            ratios = (
                f"{mine / ours:.2f}"
                for mine, ours in zip((wall, cpu), least[base.get(way, way)], strict=True)
            )
            count = f"{flops[way]:.0f}" if flops[way] else "–"  # JAX's are not seen
            table.add_row(name, way, count, f"{wall:.2f}", f"{cpu:.2f}", *ratios)
    console = Console(width=100)
    console.print(table)
    console.print(f"sgemm: {sgemm_rate():.0f} GFLOP/s, matrices of 2,048 rows")


if __name__ == "__main__":
    main()
