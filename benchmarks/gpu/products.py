"""How fast products are: operations per second over those of the card's matrix product.

A GPT of 10.8 M parameters at 163,840 tokens and a ResNet18 at 1,024 images, all blocks in lockstep,
in float32 and in TF32; probes one by one and batched; graphs kept and made again; and a product
replayed as a CUDA graph, where a model is too small to fill the card.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.cases import CROSS_ENTROPY, Case, count_flops, gpt_10m, images, seeded, small
from benchmarks.gpu.desk import Desk
from harness.errors import reason_of
from harness.estimator.batches import take
from harness.estimator.blocks import find_blocks
from harness.estimator.checks import fixed_arithmetic
from harness.estimator.device import device_memory, peak_bytes
from harness.estimator.hessian import BlockHessian
from harness.estimator.lanczos import Recurrence, advance, start
from harness.estimator.memory import is_out_of_memory, release_cache
from harness.estimator.objective import Objective
from harness.estimator.operators import opened
from harness.estimator.probes import draw_probe, probe_seed
from harness.estimator.settings import Settings
from spectra_db.quadrature import gauss_rule

PAPER = (10, 100)  # probes, steps
PRECISIONS = {"float32": "highest", "TF32": "high"}
MEMORY = 0.8  # of the device, for graphs and vectors
_PROBES = 4  # of looped against batched
_MOST_STEPS = 20


def resnet_paper() -> Case:
    """Return a ResNet18 of 1,000 classes, 21 blocks, at 1,024 images of 224×224."""
    from timm import create_model

    model = seeded(lambda: create_model("resnet18", num_classes=1000))
    return Case(model, CROSS_ENTROPY, images(1000, 1024, 3, 224, 224))


def cases(rehearse: bool) -> dict[str, Callable[[], Case]]:
    """Return the models by name."""
    if rehearse:
        return {"gpt": partial(small, "gpt"), "cnn": partial(small, "cnn")}
    return {"gpt": partial(gpt_10m, num_sequences=640), "resnet18": resnet_paper}


def measure_products(desk: Desk) -> bool:
    """Measure each model in each arithmetic, and say each number when it is known."""
    device = torch.device(desk.device)
    names = [(c, p) for c in cases(desk.rehearse) for p in PRECISIONS]
    todo = [(c, p) for c, p in names if not desk.known(f"{c} {p} probes")]
    for position, (case, precision) in enumerate(todo):
        seconds = desk.left / (len(todo) + 1 - position)
        if seconds <= 0:
            return False
        try:
            _measure(desk, device, case, precision, seconds)
        except (RuntimeError, ImportError) as error:  # the other cases can do without this one
            desk.say(f"{case} {precision} probes", status="failed", reason=reason_of(error))
        release_cache(device)
    for case in cases(desk.rehearse):
        wide, narrow = (desk.known(f"{case} {precision} steps") for precision in PRECISIONS)
        if wide and narrow:  # how far TF32 is from float32
            desk.say(f"{case} deviation", **deviations(wide, narrow))
    if device.type == "cuda" and not desk.known("CUDA graph"):
        desk.say("CUDA graph", **replayed(device))
    return True


def _measure(
    desk: Desk, device: torch.device, case_name: str, precision: str, seconds: float
) -> None:
    case = cases(desk.rehearse)[case_name]()
    name = f"{case_name} {precision}"
    begin = time.monotonic()
    blocks = find_blocks(case.model)
    settings = Settings(
        device=str(device),
        matmul_precision=PRECISIONS[precision],
        memory_budget=int(MEMORY * device_memory(device)),
    )
    objective = Objective(case.model.to(device), case.loss_fn, [case.batch])
    with opened(objective, blocks, settings) as hessian:
        flops, peak = step_flops(hessian), matmul_rate(device)
        states = [start(first_vector(hessian, i)) for i in range(len(blocks))]
        warm = timed(device, partial(steps, hessian, states, 1))
        left = seconds / 2 - (time.monotonic() - begin)
        number = max(1, min(2 if desk.rehearse else _MOST_STEPS - 1, int(left / warm)))
        step = timed(device, partial(steps, hessian, states, number)) / number
        desk.say(
            f"{name} steps",
            seconds_per_step=step,
            tflops=flops / step / 1e12,
            matmul_tflops=peak / 1e12,
            share_of_matmul=flops / step / peak,
            paper_hours=step * PAPER[0] * PAPER[1] / 3600,
            microbatch=hessian.microbatch_size,
            keeps_graphs=hessian.keeps_graphs,
            peak_gib=peak_bytes(device) / 2**30,
            alphas=[s.alphas for s in states],
            betas=[s.betas for s in states],
        )
        if hessian.keeps_graphs:
            hessian._kept, hessian.keeps_graphs = [], False
            release_cache(device)
            again = timed(device, partial(steps, hessian, states, 1))
            desk.say(f"{name} graphs made again", seconds_per_step=again, kept=step)
        looped, batched = looped_and_batched(hessian, 2 if desk.rehearse else _PROBES)
        desk.say(f"{name} probes", looped_seconds=looped, batched_seconds=batched)


def steps(hessian: BlockHessian, states: list[Recurrence], num_steps: int) -> None:
    """Take Lanczos steps of one probe of every block, in lockstep."""
    for _ in range(num_steps):
        live = [(i, s) for i, s in enumerate(states) if not s.breakdown]
        products = hessian.products([(i, s.vector) for i, s in live])
        advance([s for _, s in live], products)


def first_vector(hessian: BlockHessian, index: int) -> torch.Tensor:
    """Draw the probe of a block."""
    block = hessian.blocks[index]
    seed = probe_seed(0, "gpu", "init", block.name, 0)
    return draw_probe(block.num_params, seed, "gaussian").to(hessian.device, hessian.dtype)


def step_flops(hessian: BlockHessian) -> float:
    """Count the operations of a step on one sample, and scale them to the batch."""
    whole = hessian.batches, hessian.weights, hessian.keeps_graphs
    hessian.batches, hessian.weights = [take(hessian.batches[0], 0, 1)], [1.0]
    # A kept graph's forward and backward pass are not part of a step.
    shared = 0
    if hessian.keeps_graphs:
        hessian.keeps_graphs = False
        shared = count_flops(hessian.gradient)
    requests = [(i, first_vector(hessian, i)) for i in range(len(hessian.blocks))]
    taken = count_flops(partial(hessian.products, requests))
    hessian.batches, hessian.weights, hessian.keeps_graphs = whole
    return float(taken - shared) * hessian.batch_size


def looped_and_batched(hessian: BlockHessian, num_probes: int) -> tuple[float, float | None]:
    """Time products of several probes with all blocks on one microbatch, in the two ways.

    None where batched they take more memory than there is. No graph may be kept: this makes one.
    """
    assert not hessian._kept
    names = {part.parameter for block in hessian.blocks for part in block.parts}
    gradients = hessian.graph(hessian.batches[0], names)
    pairs = [
        (g, hessian._parameters[block.name], torch.randn(num_probes, *block.shape).to(g))
        for block in hessian.blocks
        if (g := gradients[block.name]) is not None
    ]

    def loop() -> None:
        for g, p, vectors in pairs:
            for v in vectors:
                torch.autograd.grad(g, p, v, retain_graph=True)

    def batch() -> None:
        for g, p, vectors in pairs:
            torch.autograd.grad(g, p, vectors, retain_graph=True, is_grads_batched=True)

    looped = timed(hessian.device, loop)
    try:
        return looped, timed(hessian.device, batch)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return looped, None


def replayed(device: torch.device) -> dict[str, Any]:
    """Time a small model's product as it is and replayed as a CUDA graph.

    Kernels of such a model are shorter than it takes to launch them, which a replay saves.
    """
    case = small("gpt")
    model, batch = case.model.to(device), tuple(t.to(device) for t in case.batch)
    parameter = next(p for p in model.parameters() if p.dim() == 2)
    vector = torch.randn_like(parameter)
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with fixed_arithmetic(model), torch.cuda.stream(stream):
            loss = case.loss_fn(model, batch)
            (gradient,) = torch.autograd.grad(loss, parameter, create_graph=True)

            def product() -> torch.Tensor:
                return torch.autograd.grad(gradient, parameter, vector, retain_graph=True)[0]

            expected = product()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                result = product()
            plain = min(timed(device, product) for _ in range(5))
            replay = min(timed(device, graph.replay) for _ in range(5))
        return {"seconds": plain, "replayed": replay, "same": torch.equal(result, expected)}
    except RuntimeError as error:
        return {"status": "failed", "reason": reason_of(error)}


def matmul_rate(device: torch.device) -> float:
    """Return the rate of a large matrix product, in operations per second."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device) for _ in range(2))
    timed(device, lambda: a @ b)
    return 2 * n**3 / min(timed(device, lambda: a @ b) for _ in range(5))


def timed(device: torch.device, run: Callable[[], object]) -> float:
    """Return the seconds that something takes, the device's work included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - begin


def deviations(wide: dict[str, Any], narrow: dict[str, Any]) -> dict[str, float]:
    """Return the largest relative change of a block's largest |node| and of its rms eigenvalue.

    Args:
        wide: alphas and betas of each block, as the report has them.
        narrow: The same in another arithmetic; of unequal steps, the first ones are compared.
    """

    def numbers(alphas: list[float], betas: list[float]) -> tuple[float, float]:
        nodes, weights = gauss_rule(alphas, betas)
        return float(abs(nodes).max()), float(weights @ nodes**2) ** 0.5

    changes = []
    for lists in zip(wide["alphas"], wide["betas"], narrow["alphas"], narrow["betas"], strict=True):
        count = min(len(lists[0]), len(lists[2]))
        a, b, c, d = (some[:count] for some in lists)
        pairs = zip(numbers(a, b), numbers(c, d), strict=True)
        changes.append([abs(y / x - 1) for x, y in pairs if x])
    largest, rms = (max(kind) for kind in zip(*filter(None, changes), strict=True))
    return {"largest": largest, "rms": rms}
