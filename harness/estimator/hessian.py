"""Products of block Hessians with vectors, all blocks and probes in lockstep."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TypeVar

import torch
from torch import nn

from harness.errors import UserError
from harness.estimator.batches import (
    Batch,
    halves,
    leading_size,
    place,
    take,
    terms,
    warn_of_lengths,
)
from harness.estimator.blocks import FULL_BLOCK, Block
from harness.estimator.causes import explained
from harness.estimator.checks import (
    check_deterministic,
    check_twice_differentiable,
    warn_of_asymmetry,
    warn_of_precision,
)
from harness.estimator.device import choose_device, memory_share
from harness.estimator.differences import Differences
from harness.estimator.graphs import GaussNewtonGraph, Graph, split_or_refuse
from harness.estimator.lanczos import WHOLE, Inner
from harness.estimator.memory import PeakMemory, is_out_of_memory, release_cache
from harness.estimator.objective import LossFn, Objective
from harness.estimator.operations import SoundOperations
from harness.estimator.prepare import check_blocks, fit, working_copy
from harness.estimator.settings import Settings
from harness.estimator.share import Share

Gradients = dict[str, torch.Tensor | None]
DTYPES = {"float64": torch.float64, "float32": torch.float32}
T = TypeVar("T")


class BlockHessian:
    """The diagonal blocks of the Hessian of the mean loss over a fixed batch.

    For block l with parameters w_l: H_l = ∂²/∂w_l² Σ_b (t_b / Σ t) L_b, where L_b is the mean
    loss of microbatch b and t_b the number of terms that it averages; so H_l does not depend on
    the split. With operator ggn H_l is the Gauss-Newton matrix J_lᵀ (∇²c) J_l instead, of the same
    loss in two parts, c(z(w)). A product is the derivative of ⟨∂L/∂w_l, v⟩ (Pearlmutter 1994): one
    forward and one backward pass per microbatch are shared by all blocks and vectors, and each
    second backward pass walks only the part of the network after its block.

    Works on a copy of the model; the caller's stays as it is.

    Attributes:
        blocks: As given.
        model: The working copy.
        loss_fn: As given.
        batches: The microbatches on the device, halved if they would not fit; with a share, this
            process's.
        weights: t_b / Σ t per microbatch.
        num_terms: Σ t.
        precision: The coarsest dtype that the model computes in, be it that of the products.
        batch_size: Samples in all microbatches.
        microbatch_size: Samples in the largest microbatch.
        memory_budget: Bytes for graphs and vectors.
        graph_bytes: Estimate of what the largest microbatch's graph keeps.
        product_bytes: Estimate of the most that a product takes: a graph and what comes and goes.
        keeps_graphs: The graphs of all microbatches are kept between products.
        most_bytes: Estimate of what is taken at most beside the model: kept graphs and a product.
            With a share the same in all processes.
        is_autograd: Products are exact, so that asymmetry tells of a wrong second derivative.
        is_shared: Several processes make each product together.
        operator: hessian or ggn.
        inner: The inner product of the vectors.
        shortcuts: Cheaper products of some blocks, v ↦ H_l v by the block's index.
    """

    is_autograd = True
    inner: Inner = WHOLE

    def __init__(
        self,
        objective: Objective,
        blocks: Sequence[Block],
        settings: Settings,
        *,
        share: Share | None = None,
    ) -> None:
        """Copy the model, place the batches, check the loss, size the graphs.

        To be used inside `checks.fixed_arithmetic`, as `opened` does. With a share every process
        is given all batches and keeps its part of them.

        Raises:
            UserError: Bad batches, weights or blocks, a loss that is not deterministic, or a
                graph that does not fit the memory budget even for one sample.
        """
        loss_fn, norm_mode = objective.loss_fn, settings.norm_mode
        dtype, device = DTYPES[settings.dtype], choose_device(objective.model, settings.device)
        self.blocks = list(blocks)
        self.memory_budget = settings.memory_budget or memory_share(device)
        self.model = self._own(objective.model, norm_mode, device, dtype)
        self.loss_fn, self.operator = loss_fn, settings.operator
        is_ggn = self.operator == "ggn"
        self._split = split_or_refuse(loss_fn, "operator='ggn'") if is_ggn else None
        self._parameters = dict(self.model.named_parameters())
        self._operations = SoundOperations()
        check_blocks(self.blocks, self.model)
        self.batches = [place(batch, device, dtype) for batch in objective.batches]
        if not self.batches:
            raise UserError("batches is empty; pass at least one batch")
        self.batch_size = sum(leading_size(b) for b in self.batches)
        count, num_terms = terms(self.batches, objective.count)
        if objective.count is None:
            warn_of_lengths(self.batches)
        with self._operations.looking():
            check_deterministic(
                self.model, loss_fn, self.batches, count, batch_mates=norm_mode == "eval"
            )
        # Counts the terms of a piece of a batch; None: batches can't be cut.
        self._count = count if norm_mode == "eval" else None
        self.precision = dtype
        self.batches, self._fewest, self.graph_bytes, self.product_bytes = fit(
            self.batches, self._count, self.memory_budget, self._saved_bytes, self.measure_peak
        )
        if dtype == torch.float64 != self.precision:
            warn_of_precision(self.model, loss_fn, self.batches[0], self.precision)
        if self._count is not None:
            num_terms = [self._count(b) for b in self.batches]
        self.num_terms = sum(num_terms)
        self.weights = [t / self.num_terms for t in num_terms]
        self.microbatch_size = max(leading_size(b) for b in self.batches)
        num_batches = len(self.batches)
        self._share = share
        self.is_shared = share is not None
        if share is not None:
            # The same numbers in all processes, which must go through the same products.
            num_batches, largest = share.sizes(self.batches, cut=self._count is not None)
            self._resize(largest)
            self.batches, self.weights = share.of(self.batches, self.weights, self._count)
        every_graph = (num_batches - 1) * self.graph_bytes + self.product_bytes
        self.keeps_graphs = self.is_autograd and every_graph <= self.memory_budget
        self.most_bytes = every_graph if self.keeps_graphs else self.product_bytes
        self._kept: list[Graph] = []
        self.shortcuts: Mapping[int, Callable[[torch.Tensor], torch.Tensor]] = {}

    def products(self, requests: Sequence[tuple[int, torch.Tensor]]) -> list[torch.Tensor]:
        """Return H_l v for each request (index of the block l, v of shape (n_l,)), in order.

        Raises:
            UserError: The loss has no second derivative; says where.
        """
        results = self._halving(lambda: self._products(requests))
        if self._share is not None:
            self._share.add_up(results)
        return results

    def dense(self, index: int) -> torch.Tensor:
        """Return the block's Hessian, symmetrised, shape (n, n): n products."""
        block = self.blocks[index]
        identity = torch.eye(block.num_params, dtype=self.dtype, device=self.device)
        found = self.products([(index, self.shard(index, row)) for row in identity])
        H = self._whole(index, torch.stack(found))
        if self.is_autograd and (norm := float(H.norm())):
            warn_of_asymmetry([(block.name, float((H - H.T).norm()) / norm)], self.precision)
        return (H + H.T) / 2

    def shard(self, index: int, vector: torch.Tensor) -> torch.Tensor:
        """Return what of a vector of a block, shape (n_l,), this process holds."""
        return vector

    def _whole(self, index: int, shards: torch.Tensor) -> torch.Tensor:
        """Return the vectors of which rows are what this process holds, shape (k, n_l)."""
        return shards

    def _own(
        self, model: nn.Module, norm_mode: str, device: torch.device, dtype: torch.dtype
    ) -> nn.Module:
        """Return the model to work on."""
        return working_copy(model, norm_mode).to(device=device, dtype=dtype)

    def product_error(self, index: int) -> float | None:
        """Return the relative error of the products with a block; None: rounding alone."""
        return None

    def gradient(self) -> Gradients:
        """Return the gradient of the mean loss with respect to every parameter of the blocks."""
        total = self._halving(self._gradient)
        if self._share is not None:
            sums = [
                torch.zeros_like(self.parameter(n)) if t is None else t for n, t in total.items()
            ]
            self._share.add_up(sums)
            total = dict(zip(total, sums, strict=True))
        return total

    def of(self, loss_fn: LossFn, batches: Sequence[Batch] | None = None) -> BlockHessian:
        """Return the Hessian of another loss of the same model over the same batches, or others.

        Of others it is of the sum of their losses.
        """
        other = self._again()
        other.loss_fn, other._split = loss_fn, None
        if batches is not None:
            other.batches, other.weights = list(batches), [1.0] * len(batches)
        return other

    def joined(self) -> BlockHessian:
        """Return the Hessian of all blocks as one, the mixed derivatives between them too."""
        other, sizes = self._again(), [block.num_params for block in self.blocks]
        parts = tuple(part for block in self.blocks for part in block.parts)
        other.blocks = [Block(FULL_BLOCK, "full", parts, sum(sizes), (sum(sizes),))]
        return other

    def _again(self) -> BlockHessian:
        """Return a copy that keeps nothing between products."""
        other = copy.copy(self)
        other.__dict__.pop("differences", None)
        other._kept, other.keeps_graphs, other.shortcuts = [], False, {}
        return other

    def take_shortcuts(
        self, shortcuts: Mapping[int, Callable[[torch.Tensor], torch.Tensor]], nbytes: int
    ) -> None:
        """Make the products of some blocks another way from now on, which keeps so many bytes."""
        self.shortcuts = shortcuts
        self.release()
        self.keeps_graphs &= self.most_bytes + nbytes <= self.memory_budget
        self.most_bytes = nbytes + (self.most_bytes if self.keeps_graphs else self.product_bytes)

    def release(self) -> None:
        """Let go of graphs that are kept between products; the next product makes them again."""
        self._kept = []

    @property
    def can_cut(self) -> bool:
        """Tell whether samples are independent and counted: batches can be cut, and joined."""
        return self._count is not None

    def pieces(self) -> Iterator[tuple[Batch, float]]:
        """Yield as few samples at a time as the model takes, with their weights in the mean.

        Whole microbatches where they can't be cut.
        """
        if self._count is None:
            yield from zip(self.batches, self.weights, strict=True)
            return
        for batch in self.batches:
            size = leading_size(batch)
            for places in torch.arange(size).tensor_split(max(size // self._fewest, 1)):
                piece = take(batch, int(places[0]), int(places[-1]) + 1)
                if terms := self._count(piece):
                    yield piece, terms / self.num_terms

    def outputs(self, batch: Batch) -> torch.Tensor:
        """Return the outputs of a loss that is in two parts."""
        split = split_or_refuse(self.loss_fn, "outputs")
        with explained(self.model, self.loss_fn, batch), self._operations:
            return split.outputs_of(self.model, batch)

    def pull_back(
        self,
        batch: Batch,
        cotangents: torch.Tensor,
        blocks: Sequence[Block],
        rows: Sequence[torch.Tensor],
    ) -> None:
        """Write J_lᵀ u for each of some blocks and each u, by a backward pass for each u.

        Args:
            batch: Samples of which J is the derivative of the outputs.
            cotangents: The u, shape (k, *outputs).
            blocks: Some of the blocks.
            rows: Where to, of each block, shape (k, n_l).
        """
        names = list(dict.fromkeys(part.parameter for b in blocks for part in b.parts))
        parameters = [self._parameters[name] for name in names]
        z = self.outputs(batch)
        for k, u in enumerate(cotangents):
            found = torch.autograd.grad(z, parameters, u, retain_graph=True, materialize_grads=True)
            slopes = dict(zip(names, found, strict=True))
            for target, block in zip(rows, blocks, strict=True):
                pieces = [part.of(slopes[part.parameter]) for part in block.parts]
                whole = target[k].split([piece.numel() for piece in pieces])
                for view, piece in zip(whole, pieces, strict=True):
                    view.view_as(piece).copy_(piece.detach())

    def measure_peak(self, batch: Batch) -> int:
        """Measure the most memory, in bytes, that a graph of a batch and a product with it take."""
        # The first block's product walks the whole network behind it.
        block = self.blocks[0]
        vector = torch.ones(block.num_params, dtype=self.dtype, device=self.device)
        with PeakMemory(self.device) as memory:
            gradients = self.graph(place(batch, self.device, self.dtype), self._names())
            self._add_product(torch.zeros_like(vector), gradients, block, vector, 1.0)
        return memory.peak

    def parameter(self, name: str) -> torch.Tensor:
        """Return a parameter of the working copy, detached."""
        return self._parameters[name].detach()

    @cached_property
    def differences(self) -> Differences:
        """What the products must equal, within what differences of the gradient can tell."""
        parts = (self.batches, self.weights, self.blocks, self._share)
        return Differences.precise(self.model, self.loss_fn, *parts)

    @property
    def dtype(self) -> torch.dtype:
        """The arithmetic of the products."""
        return self._parameters[self.blocks[0].parts[0].parameter].dtype

    @property
    def device(self) -> torch.device:
        """The device of the products."""
        return self._parameters[self.blocks[0].parts[0].parameter].device

    def _products(self, requests: Sequence[tuple[int, torch.Tensor]]) -> list[torch.Tensor]:
        """Return this process's part of the products."""
        results = [
            self.shortcuts[i](v) if i in self.shortcuts else torch.zeros_like(v)
            for i, v in requests
        ]
        pairs = zip(results, requests, strict=True)
        others = [(result, i, v) for result, (i, v) in pairs if i not in self.shortcuts]
        if results and not others:
            return results
        names = {part.parameter for _, i, _ in others for part in self.blocks[i].parts}
        for gradients, weight in zip(self._graphs(names), self.weights, strict=True):
            for result, i, v in others:
                self._add_product(result, gradients, self.blocks[i], v, weight)
        return results

    def _gradient(self) -> Gradients:
        """Return this process's part of the gradient."""
        total: Gradients = dict.fromkeys(sorted(self._names()))  # one order in all processes
        for batch, weight in zip(self.batches, self.weights, strict=True):
            for name, g in self.graph(batch, set(total), create_graph=False).items():
                if g is not None:
                    so_far = total[name]
                    scaled = weight * g.detach()
                    total[name] = scaled if so_far is None else so_far + scaled
        return total

    def _halving(self, compute: Callable[[], T]) -> T:
        """Return what `compute` does, with the microbatches halved while memory runs out."""
        while True:
            try:
                return compute()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0] if str(error) else "MemoryError"
            # Only here, where the error no longer holds the frames that hold the tensors.
            self._kept, self.shortcuts = [], {}
            release_cache(self.device)
            if self._count is None or self.microbatch_size < 2 * self._fewest:
                raise UserError(
                    f"out of memory with microbatches of {self.microbatch_size} samples, which "
                    f"can't be halved ({reason}); pass smaller batches, or use a larger device"
                )
            whole = self.microbatch_size
            self.batches = [b for batch in self.batches for b in halves(batch, whole, self._count)]
            self.weights = [self._count(b) / self.num_terms for b in self.batches]
            self._resize((whole + 1) // 2)
            self.keeps_graphs = False

    def _resize(self, microbatch_size: int) -> None:
        """Note that microbatches are of another size, and estimate anew what one takes."""
        whole, self.microbatch_size = self.microbatch_size, microbatch_size
        self.graph_bytes = self.graph_bytes * microbatch_size // whole
        self.product_bytes = self.product_bytes * microbatch_size // whole

    def _add_product(
        self,
        result: torch.Tensor,
        gradients: Graph,
        block: Block,
        vector: torch.Tensor,
        weight: float,
    ) -> None:
        """Add weight · H_l v of one microbatch to the result."""
        outputs, inputs, directions = [], [], []
        sizes = [part.of(self._parameters[part.parameter]).shape for part in block.parts]
        pieces = vector.split([s.numel() for s in sizes])
        for part, shape, piece in zip(block.parts, sizes, pieces, strict=True):
            g = gradients[part.parameter]
            inputs.append(self._parameters[part.parameter])
            if g is not None and g.requires_grad:
                outputs.append(part.of(g))
                directions.append(piece.view(shape))
        if not outputs:
            return  # the loss is linear in these parameters, or does not use them
        with explained(self.model, self.loss_fn, self.batches[0]):
            derivatives = gradients.derivatives(outputs, inputs, directions)
        targets = result.split([s.numel() for s in sizes])
        for part, target, shape, d in zip(block.parts, targets, sizes, derivatives, strict=True):
            if d is not None:
                target.view(shape).add_(part.of(d).detach(), alpha=weight)

    def _graphs(self, names: set[str]) -> Iterator[Graph]:
        """Yield each microbatch's gradients with their graph, kept ones if there are."""
        if not self.keeps_graphs:
            for batch in self.batches:
                yield self.graph(batch, names)
            return
        if not self._kept:
            self._kept = [self.graph(batch, self._names()) for batch in self.batches]
        yield from self._kept

    def graph(self, batch: Batch, names: set[str], *, create_graph: bool = True) -> Graph:
        """Run one forward and one backward pass, to be differentiated again if asked."""
        ordered = [name for name in self._parameters if name in names]
        with explained(self.model, self.loss_fn, batch):
            with self._operations:
                if self._split is not None and create_graph:
                    graph: Graph = GaussNewtonGraph(self._split, self.model, batch)
                else:
                    graph = Graph(self.loss_fn(self.model, batch).reshape(()))
            if not graph.value.requires_grad:
                raise UserError("the loss does not depend on the parameters of the blocks")
            gradients = torch.autograd.grad(
                graph.value,
                [self._parameters[name] for name in ordered],
                graph.cotangent,
                create_graph=create_graph,
                retain_graph=True,
                allow_unused=True,
            )
            if all(g is None for g in gradients):  # such as of an unused module alone
                self._check_uses_model(graph.value)
        graph.update(zip(ordered, gradients, strict=True))
        return graph

    def _check_uses_model(self, value: torch.Tensor) -> None:
        """Raise unless the loss depends on the copy of the model, whichever its parameter."""
        trained = [p for p in self._parameters.values() if p.requires_grad]
        found = torch.autograd.grad(value.sum(), trained, retain_graph=True, allow_unused=True)
        if all(g is None for g in found):
            raise UserError(
                "the loss depends on no parameter of the model that loss_fn is given; use that "
                "one, (model, batch) ↦ loss, and not another one from around it"
            )

    def _saved_bytes(self, batch: Batch) -> int:
        """Count the bytes of distinct storages that a graph of this batch keeps.

        Looks through that graph for operations without a second derivative, and for its dtypes.
        """
        storages: dict[int, int] = {}

        def count(tensor: torch.Tensor) -> torch.Tensor:
            if tensor._is_zerotensor():  # the zero of a forward derivative has no storage
                return tensor
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()

        own = {p.untyped_storage().data_ptr() for p in self._parameters.values()}
        names = self._names()
        try:
            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                gradients = self.graph(batch, names)
            kept = sum(nbytes for pointer, nbytes in storages.items() if pointer not in own)
        except UserError as error:
            # Transforms of torch.func refuse such hooks, be they around the whole loss: counts the
            # most that a graph and its making take.
            if "saved tensor hooks" not in str(error):
                raise
            with PeakMemory(self.device) as memory:
                gradients = self.graph(batch, names)
            kept = memory.peak
        coarsest = check_twice_differentiable(gradients.values())
        self.precision = max(self.precision, coarsest, key=lambda dtype: torch.finfo(dtype).eps)
        return kept

    def _names(self) -> set[str]:
        """Return the names of the blocks' parameters."""
        return {part.parameter for block in self.blocks for part in block.parts}
