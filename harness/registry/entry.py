"""One entry of the registry: a model, its data and its recipe, as frozen data.

Imports no torch: `build` does.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from harness.errors import UserError
from spectra_db.words import SLUG, TIERS, WHOLE
from spectra_db.words import STAGES as STAGES  # for entry files, which name it

if TYPE_CHECKING:
    from torch import nn

# What table `models` has of an entry as it stands there.
FACTS = ("family", "tier", "task", "source", "licence", "reference")
MIN_STEPS = 100  # of a training run whose losses are results; fewer are a rehearsal
_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Recipe:
    """How an entry is trained; docs/protocol.md, Training and gap.

    Attributes:
        num_steps: Optimizer steps of a run.
        batch_size: Samples (images or sequences) of a step.
        sgd_lrs: Lowest and highest peak learning rate of SGD's grid.
        adamw_lrs: The same of AdamW's.
        num_lrs: Learning rates per grid, evenly spaced in the logarithm.
        weight_decay: Of both optimizers, on tensors of two or more dimensions.
        adamw_betas: Of AdamW; the paper has (0.9, 0.95) for language.
        clip: Norm that gradients are clipped to, None for no clipping.
        warmup_steps: Steps of linear warm-up.
        schedule: cosine or constant, after the warm-up.
        eval_size: Samples of the fixed training subset whose loss is the final loss.
        extend_grid: Add rates while the best lies at an edge.
    """

    num_steps: int
    batch_size: int
    sgd_lrs: tuple[float, float]
    adamw_lrs: tuple[float, float]
    num_lrs: int = 5
    weight_decay: float = 0.0
    adamw_betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = None
    warmup_steps: int = 0
    schedule: str = "cosine"
    eval_size: int = 2048
    extend_grid: bool = True

    momentum: ClassVar[float] = 0.9  # of SGD

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "eval_size"):
            if getattr(self, name) < 1:
                raise UserError(f"recipe: {name} is {getattr(self, name)}; it must be at least 1")
        for name in ("sgd_lrs", "adamw_lrs"):
            given = getattr(self, name)
            try:
                low, high = given
            except (TypeError, ValueError):
                raise UserError(
                    f"recipe: {name} is {given!r}; it must be the lowest and the highest rate"
                ) from None
            if not 0 < low < high:
                raise UserError(f"recipe: {name} is {given}; it must be 0 < lowest < highest")
        if self.num_lrs < 2:
            raise UserError(f"recipe: num_lrs is {self.num_lrs}; it must be at least 2")
        if self.schedule not in ("cosine", "constant"):
            raise UserError(f"recipe: schedule is {self.schedule!r}; choose cosine or constant")


@dataclass(frozen=True)
class SpeedupRecipe:
    """How the speed-up of AdamW over SGD is measured; docs/protocol.md, Protocol 2.

    A run has T, 2T or 4T steps, each a full schedule of its own. Neither optimizer decays weights:
    both minimise the same loss.

    Attributes:
        num_steps: T.
        batch_size: Samples (images or sequences) of a step.
        sgd_lr: Peak learning rate at which the climb of SGD's begins.
        adamw_lr: The same of AdamW's.
        adamw_betas: Of AdamW; (0.9, 0.95) for language as in the paper.
        momentum: Of SGD.
        clip: Norm that gradients are clipped to, None for no clipping.
        eval_size: Samples of the fixed training subset whose loss is a run's loss.
    """

    num_steps: int
    batch_size: int
    sgd_lr: float
    adamw_lr: float
    adamw_betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    clip: float | None = None
    eval_size: int = 2048

    weight_decay: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "eval_size"):
            if getattr(self, name) < 1:
                raise UserError(f"speedup: {name} is {getattr(self, name)}; it must be at least 1")
        for name in ("sgd_lr", "adamw_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"speedup: {name} is {getattr(self, name)}; it must be positive")


def partition_of(tier: str) -> str:
    """Name the partition that a tier's spectra are of: the paper's blocks in tier paper."""
    return "paper" if tier == "paper" else "weights"


def check_slug(what: str, given: str) -> None:
    """Raise unless a name can name files and rows."""
    if not SLUG.fullmatch(given):
        raise UserError(
            f"{what} is {given!r}; use lower-case letters, digits, '.', '_', '-', as in vit-digits"
        )


@dataclass(frozen=True)
class ModelEntry:
    """A model that the harness can build, train and take spectra of.

    Attributes:
        name: Slug that names files and rows.
        family: Family of architectures; statistics resample families.
        tier: demo, small, paper, ranked or reference.
        factory: "module:callable" that returns the module.
        options: Keyword arguments of the factory; they win over the task's.
        task: Name of the task (data and loss).
        task_options: Its keyword arguments.
        hessian_batch_size: Samples of the Hessian's batch.
        microbatch_size: Samples of a microbatch, None for the whole batch.
        moments_batch_size: Samples of a larger batch for the metrics that need but few products,
            the spreads of moments and gradients, at init; None: the Hessian's batch.
        recipe: How it is trained; None: only its initial spectrum is taken.
        speedup: How its speed-up is measured (protocol 2); None: it is not.
        stages: Stages at which spectra are taken.
        full_stages: Stages at which the full spectrum is taken too.
        num_probes, num_steps: Of the stochastic Lanczos quadrature.
        paper_blocks: Shell patterns over block names that partition `paper` keeps.
        blocks: Kinds by shell pattern over names of parameters, where names and modules don't tell
            them; other, norm or bias: it is none of partition `weights`.
        pretrained: Entry whose final AdamW checkpoint, of seed 1, initialises this one.
        source: Where the architecture's code comes from.
        reference: Paper or page that defines the architecture.
        licence: Licence of the architecture's code.
        description: One sentence.
        status: ok, or pending where something it needs can't be had.
        reason: Why it is pending.
    """

    name: str
    family: str
    tier: str
    factory: str
    task: str
    hessian_batch_size: int
    source: str
    reference: str
    licence: str
    description: str
    options: Mapping[str, Any] = field(default_factory=dict)
    task_options: Mapping[str, Any] = field(default_factory=dict)
    microbatch_size: int | None = None
    moments_batch_size: int | None = None
    recipe: Recipe | None = None
    speedup: SpeedupRecipe | None = None
    stages: tuple[str, ...] = ("init",)
    full_stages: tuple[str, ...] = ()
    num_probes: int = 3
    num_steps: int = 40
    paper_blocks: tuple[str, ...] | None = None
    blocks: Mapping[str, str] = field(default_factory=dict)
    pretrained: str | None = None
    status: str = "ok"
    reason: str | None = None

    def __post_init__(self) -> None:
        def refuse(attribute: str, allowed: str) -> None:
            given = getattr(self, attribute)
            raise UserError(f"entry {self.name!r}: {attribute} is {given!r}; {allowed}")

        for attribute in ("name", "family"):
            check_slug(f"entry {self.name!r}: {attribute}", getattr(self, attribute))
        if self.name == WHOLE:
            refuse("name", "it names what is of all models together")
        if self.tier not in TIERS:
            refuse("tier", f"choose one of {', '.join(TIERS)}")
        if not _FACTORY.fullmatch(self.factory):
            refuse("factory", "write module:callable, as in timm:create_model")
        for attribute in ("stages", "full_stages"):
            if not set(getattr(self, attribute)) <= set(STAGES):
                refuse(attribute, f"choose from {', '.join(STAGES)}")
            object.__setattr__(self, attribute, tuple(getattr(self, attribute)))
            if len(set(getattr(self, attribute))) < len(getattr(self, attribute)):
                refuse(attribute, "name each once")
        if not set(self.full_stages) <= set(self.stages):
            refuse("full_stages", "they must be among the stages")
        if self.recipe is None and self.speedup is None and self.stages != ("init",):
            refuse("stages", "without a recipe there is only init")
        if self.recipe is not None and self.speedup is not None:
            refuse("speedup", "an entry follows one protocol: give recipe or speedup")
        if self.speedup is not None and not set(self.stages) <= {"init", "final"}:
            refuse("stages", "trials keep final weights alone: choose from init, final")
        sizes = ("hessian_batch_size", "microbatch_size", "moments_batch_size")
        for attribute in (*sizes, "num_probes", "num_steps"):
            if (value := getattr(self, attribute)) is not None and value < 1:
                refuse(attribute, "it must be at least 1")
        for attribute in ("source", "reference", "licence", "description"):
            if not getattr(self, attribute).strip():
                refuse(attribute, "it must not be empty")
        if (self.status == "ok") != (self.reason is None) or self.status not in ("ok", "pending"):
            refuse("status", "use ok without a reason, or pending with one")
        for attribute in ("options", "task_options", "blocks"):  # frozen means frozen
            object.__setattr__(self, attribute, MappingProxyType(dict(getattr(self, attribute))))

    @property
    def grid_recipe(self) -> Recipe | None:
        """The recipe of the grid of runs that is trained; None without stages after init."""
        return self.recipe if self.stages != ("init",) else None

    @property
    def trained_by(self) -> Recipe | SpeedupRecipe | None:
        """The recipe of the runs that are trained, of either protocol; None where none are."""
        return self.speedup or self.grid_recipe

    @property
    def is_rehearsal(self) -> bool:
        """Tell whether its runs are too short to be results: they try the way to a submission."""
        return self.grid_recipe is not None and self.grid_recipe.num_steps < MIN_STEPS

    @property
    def partition(self) -> str:
        """Name the partition whose spectra are taken."""
        return partition_of(self.tier)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by value; a mapping proxy can't be pickled."""
        values = [getattr(self, name) for name in self.__dataclass_fields__]
        plain = [dict(v) if isinstance(v, MappingProxyType) else v for v in values]
        return type(self), tuple(plain)

    def build(self, model_options: Mapping[str, Any], seed: int) -> nn.Module:
        """Build the model, its initialisation seeded.

        Args:
            model_options: What the task says of its data (num_classes, image_size, in_channels;
                vocab_size, context); the factory gets those that it names.
            seed: Seeds torch's global generator while building; it is restored afterwards.

        Raises:
            UserError: The factory can't be imported, or raises.
        """
        import torch

        factory = self._import_factory()
        named = inspect.signature(factory).parameters
        options = {k: v for k, v in model_options.items() if k in named} | dict(self.options)
        with torch.random.fork_rng(devices=[]):  # built on the CPU: GPUs' generators stay alone
            torch.default_generator.manual_seed(seed)
            try:
                model = factory(**options)
            except UserError as error:  # says what to do already
                raise UserError(f"entry {self.name!r}: {error}") from error
            except Exception as error:
                hint = ""
                if (side := model_options.get("image_size")) is not None:
                    hint = (
                        f". If the images, {side} × {side}, are not of its size: option "
                        "image_size of the task resizes them"
                    )
                raise UserError(
                    f"entry {self.name!r}: {self.factory} failed with {type(error).__name__}: "
                    f"{error}; its arguments were {options}{hint}"
                ) from error
        if not isinstance(model, torch.nn.Module):
            raise UserError(
                f"entry {self.name!r}: {self.factory} returned {type(model).__name__}; it must "
                "return a torch.nn.Module"
            )
        model.train()  # an author's override may return nothing
        return model

    def _import_factory(self) -> Any:
        module, _, attribute = self.factory.partition(":")
        try:
            return getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"entry {self.name!r}: factory {self.factory!r} can't be imported ({error})"
            ) from error
