"""How fast products are on a GPU, and what the paper's settings would take: one command, minutes.

    python -m benchmarks.gpu

Needs torch and numpy alone. A GPT of 10.8 M parameters at 163,840 tokens, all 39 blocks in
lockstep: float32 and TF32, probes one by one and batched; the rate over 20 Lanczos steps, and the
time of 10 probes × 100 steps.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import cross_entropy, gpt, tokens
from harness.estimator.blocks import find_blocks
from harness.estimator.checks import fixed_arithmetic, take
from harness.estimator.device import device_memory, device_name
from harness.estimator.hessian import BlockHessian
from harness.estimator.lanczos import Recurrence, advance, start
from harness.estimator.probes import draw_probe, probe_seed

PAPER = (10, 100)  # probes, steps
PRECISIONS = {"float32": "highest", "TF32": "high"}
SIZES = {
    "full": {"num_layers": 6, "num_heads": 6, "width": 384, "context": 256, "sequences": 640},
    "tiny": {"num_layers": 1, "num_heads": 2, "width": 32, "context": 16, "sequences": 8},
}


def main() -> None:
    """Measure, print, and write what was found with all alphas and betas."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--steps", type=int, default=20, help="Lanczos steps (default: 20)")
    parser.add_argument("--probes", type=int, default=4, help="of looped against batched")
    parser.add_argument("--out", type=Path, default=Path("build/gpu.json"))
    options = parser.parse_args()
    if options.steps < 2 or options.probes < 1:
        parser.error("--steps must be 2 at least, the first of which warms up, and --probes 1")
    found = measure(torch.device(options.device), options.size, options.steps, options.probes)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1))
    print(f"alphas and betas of all blocks are in {options.out}")


def measure(device: torch.device, size: str, num_steps: int, num_probes: int) -> dict[str, Any]:
    """Measure everything on a device; print each number when it is known."""
    numbers = dict(SIZES[size])
    sequences, context = numbers.pop("sequences"), numbers.pop("context")
    model = gpt(65, context, **numbers).to(device)
    batch = tuple(t.to(device) for t in tokens(65, sequences, context))
    blocks = find_blocks(model)
    found: dict[str, Any] = {"device": device_name(device), "torch": torch.__version__}
    num_params = sum(p.numel() for p in model.parameters())
    print(
        f"{found['device']}, torch {torch.__version__}: GPT of {num_params:,} parameters, "
        f"{len(blocks)} blocks, {sequences * context:,} tokens",
        flush=True,
    )
    runs: dict[str, list[Recurrence]] = {}
    for name, precision in PRECISIONS.items():
        with fixed_arithmetic(model, precision):
            hessian = BlockHessian(
                model, cross_entropy, [batch], blocks, device=device,
                memory_budget=int(0.85 * device_memory(device)),
            )  # fmt: skip
            flops = step_flops(hessian)
            peak = matmul_rate(device)
            states = [start(first_vector(hessian, i)) for i in range(len(blocks))]
            steps(hessian, states, 1)  # warms up
            seconds = timed(device, partial(steps, hessian, states, num_steps - 1))
            seconds /= num_steps - 1
            looped, batched = looped_and_batched(hessian, num_probes)
        runs[name] = states
        hours = seconds * PAPER[0] * PAPER[1] / 3600
        found[name] = {
            "seconds_per_step": seconds,
            "tflops": flops / seconds / 1e12,
            "matmul_tflops": peak / 1e12,
            "share_of_matmul": flops / seconds / peak,
            "paper_settings_hours": hours,
            "microbatch_size": hessian.microbatch_size,
            "looped_seconds": looped,
            "batched_seconds": batched,
            "alphas": [s.alphas for s in states],
            "betas": [s.betas for s in states],
        }
        print(
            f"{name}: {seconds:.3g} s a step of all blocks, {flops / seconds / 1e12:.3g} TFLOP/s, "
            f"{flops / seconds / peak:.0%} of a matrix product's {peak / 1e12:.3g}; "
            f"{PAPER[0]} × {PAPER[1]}: {hours:.3g} h; microbatches of {hessian.microbatch_size}; "
            f"{num_probes} probes of one microbatch looped {looped:.3g} s, batched "
            + (f"{batched:.3g} s" if batched else "out of memory"),
            flush=True,
        )
    found["deviation"] = deviations(runs["float32"], runs["TF32"])
    print(
        "TF32 against float32, over blocks: largest eigenvalue off by at most {largest:.1g}, "
        "rms eigenvalue by {rms:.1g}".format(**found["deviation"])
    )
    return found


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
    """Count the operations of a step on one sequence, and scale them to the batch."""
    whole = hessian.batches, hessian.weights, hessian.keeps_graphs
    hessian.batches, hessian.weights = [take(hessian.batches[0], 0, 1)], [1.0]
    # A kept graph's forward and backward pass are not part of a step.
    shared = 0
    if hessian.keeps_graphs:
        hessian.keeps_graphs = False
        with FlopCounterMode(display=False) as counter:
            hessian.gradient()
        shared = counter.get_total_flops()
    requests = [(i, first_vector(hessian, i)) for i in range(len(hessian.blocks))]
    with FlopCounterMode(display=False) as counter:
        hessian.products(requests)
    hessian.batches, hessian.weights, hessian.keeps_graphs = whole
    return float(counter.get_total_flops() - shared) * hessian.batch_size


def looped_and_batched(hessian: BlockHessian, num_probes: int) -> tuple[float, float | None]:
    """Time products of several probes with all blocks on one microbatch, in the two ways."""
    names = {part.parameter for block in hessian.blocks for part in block.parts}
    gradients = hessian._gradients(hessian.batches[0], names)
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

    looped = min(timed(hessian.device, loop) for _ in range(2))
    try:
        return looped, min(timed(hessian.device, batch) for _ in range(2))
    except torch.OutOfMemoryError:
        return looped, None


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


def deviations(wide: list[Recurrence], narrow: list[Recurrence]) -> dict[str, float]:
    """Return the largest relative change of a block's largest |node| and of its rms eigenvalue."""

    def numbers(state: Recurrence) -> tuple[float, float]:
        off = torch.tensor(state.betas[:-1], dtype=torch.float64)
        T = torch.diag(torch.tensor(state.alphas, dtype=torch.float64))
        T += torch.diag(off, 1) + torch.diag(off, -1)
        square = state.alphas[0] ** 2 + state.betas[0] ** 2
        return float(torch.linalg.eigvalsh(T).abs().max()), square**0.5

    changes = []
    for a, b in zip(wide, narrow, strict=True):
        changes.append([abs(y / x - 1) for x, y in zip(numbers(a), numbers(b), strict=True) if x])
    largest, rms = (max(kind) for kind in zip(*filter(None, changes), strict=True))
    return {"largest": largest, "rms": rms}


if __name__ == "__main__":
    main()
