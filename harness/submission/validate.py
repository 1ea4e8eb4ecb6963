"""Every check that a review of an entry would make, each with cause and remedy."""

from __future__ import annotations

import copy
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from harness import tasks
from harness.errors import UserError, one_line
from harness.estimator import find_blocks
from harness.estimator.batches import leading_size, take
from harness.estimator.causes import BY_DIFFERENCES
from harness.estimator.checks import check_deterministic, fixed_arithmetic
from harness.registry.entry import ModelEntry
from harness.submission import draft, entry_file, leaks, locate, products
from harness.submission.draft import names
from harness.submission.subject import Caution, Failed, Subject
from harness.tasks.base import target_entropy
from harness.training.reference import reference_loss

SEED = 1
_SAMPLES = 4  # of products: what is wrong with an architecture is wrong with few
_MATES = 16  # of the comparison of halves
# Of the fit to few samples: rates that suit most networks, the first most often.
_FIT_RATES, _FIT_STEPS, _FEWEST_STEPS = (3e-3, 3e-4, 3e-2), 60, 3
_NOTHING = 0.99  # of R: the loss of less has not moved


@dataclass(frozen=True)
class Finding:
    """What came of one check.

    Attributes:
        check: Its name.
        outcome: ok, warning, failed, skipped: it needs one that failed, or untried: there was no
            time left.
        text: What was found; if it failed, the cause and the remedy.
        seconds: What it took, in processor time.
    """

    check: str
    outcome: str
    text: str
    seconds: float = 0.0


def validate(
    entry: ModelEntry, *, data_root: Path | None = None, budget: float = 120.0
) -> Iterator[Finding]:
    """Run the checks of an entry, one after another.

    Args:
        entry: The entry.
        data_root: Folder of data sets.
        budget: Seconds of processor time, about. Checks that go through the blocks go through as
            many as fit, and say how many, and what the others would take. A check that was begun
            is finished; once the time is over, those that may take long are not begun.

    Yields:
        A finding per check as it ends.
    """
    subject = Subject(entry, data_root, time.process_time() + budget)
    failed: set[str] = set()
    for name, (check, needs) in _CHECKS.items():
        begin = time.process_time()
        if lacks := [need for need in needs if need in failed]:
            failed.add(name)
            yield Finding(name, "skipped", f"needs {lacks[0]}")
            continue
        if name in _LONG and not subject.seconds_left:
            lacks_s = products.seconds_of(subject, name)
            text = f"{budget:g} s are over; it takes about {lacks_s:.0f} s more of --budget"
            yield Finding(name, "untried", text)
            continue
        try:
            outcome, text = "ok", check(subject)
        except Caution as warning:
            outcome, text = "warning", str(warning)
        except UserError as error:
            outcome, text = "failed", _for_authors(str(error))
        except Exception as error:  # of the author's code
            outcome, text = "failed", one_line(error) + locate.frame_of(error)
        if outcome == "failed":
            failed.add(name)
        yield Finding(name, outcome, text, time.process_time() - begin)


# What the estimator says to whoever calls it, and what the author of an entry can do instead.
_OF_CALLERS = {
    "pass norm_mode='eval', or ": "",
    " (batch statistics: pass norm_mode='train')": "",
    "pass batch_weights as a function that counts them": "let `num_terms` of the task count them",
    "pass batch_weights as a function": "let `num_terms` of the task",
    BY_DIFFERENCES: "",
}


def _for_authors(text: str) -> str:
    """Speak of what an entry's author can change, not of arguments of the Python API."""
    for given, instead in _OF_CALLERS.items():
        text = text.replace(given, instead)
    return text


def _entry(s: Subject) -> str:
    if missing := entry_file.todo(s.entry):
        raise Failed(f"{', '.join(missing)} not filled in yet; edit the entry's file")
    if s.entry.status != "ok":
        raise Failed(f"the status is {s.entry.status} ({s.entry.reason}); make it ok")
    return f"reference {s.entry.reference}; licence {s.entry.licence}"


def _data(s: Subject) -> str:
    s.task = tasks.of(s.entry)
    s.data = s.task.load(s.data_root)
    size = s.entry.hessian_batch_size
    available = s.task.size(s.data, "train")
    if size > available:
        raise Failed(f"hessian_batch_size is {size}; the data have {available} training samples")
    first, again = (s.task.fixed(s.data, "train", size) for _ in range(2))
    drawn = [
        next(s.task.batches(s.data, min(8, available), torch.Generator().manual_seed(5)))
        for _ in range(2)
    ]
    for what, (a, b) in (("fixed batches", (first, again)), ("training batches", drawn)):
        if not all(torch.equal(x, y) for x, y in zip(a, b, strict=True)):
            raise Failed(
                f"two {what} of task {s.entry.task} differ; draw whatever is random in `take` with "
                "the generator that it gets, and nothing in `read` without a seed"
            )
    if s.task.is_joint and s.entry.microbatch_size is not None:
        raise Failed(
            f"microbatch_size is {s.entry.microbatch_size}, and the samples of task {s.entry.task} "
            "depend on each other: leave it out, so that the batch is one"
        )
    if not locate.finite(first):
        raise Failed(f"the data of task {s.entry.task} hold a nan or an infinity; clean them")
    s.batch, s.mates = take(first, 0, _SAMPLES), take(first, 0, min(_MATES, size))
    identity = f"{s.data.source} (sha256 {s.data.checksum[:12]})"
    return f"{identity}; {available:,} training samples, the Hessian's batch {size}"


def _size(s: Subject) -> str:
    num_params = draft.check_size(s.entry, s.data)
    if num_params is None:
        return "not known beforehand: the factory doesn't work on the meta device"
    return f"{num_params:,} parameters"


def _build(s: Subject) -> str:
    s.model = draft.build(s.entry, s.data)
    s.model.eval()
    mine, other = s.model.state_dict(), s.entry.build(s.data.model_options, SEED).state_dict()
    if list(mine) != list(other):
        raise Failed("two builds have other parameters; let nothing but the options decide them")
    differ = [n for n, t in mine.items() if not torch.equal(t.nan_to_num(), other[n].nan_to_num())]
    if differ:
        raise Failed(
            f"two builds from one seed differ in {names(differ)}; draw initial values from "
            "torch's global generator (numpy.random and random are not seeded)"
        )
    another = s.entry.build(s.data.model_options, SEED + 1).state_dict()
    if all(torch.equal(t, another[n]) for n, t in mine.items()):
        raise Caution("builds from two seeds are the same: the initialisation ignores the seed")
    copy.deepcopy(s.model)  # or the estimator can't
    return "two builds from one seed agree, another seed gives another"


def _parameters(s: Subject) -> str:
    named = dict(s.model.named_parameters())
    if odd := [n for n, p in named.items() if p.is_complex()]:
        raise Failed(
            f"complex parameters: {names(odd)}; keep real and imaginary part as one real parameter "
            "and use torch.view_as_complex on it in forward"
        )
    if odd := [n for n, p in named.items() if not torch.isfinite(p).all()]:
        raise Failed(f"nan or infinite at initialisation: {names(odd)}; initialise them")
    if odd := [n for n, p in named.items() if not p.is_floating_point()]:
        raise Caution(f"integers, in no block: {names(odd)}; register_buffer is their place")
    if odd := [n for n, p in named.items() if p.dtype != torch.float32]:
        raise Caution(f"not float32: {names(odd)}; products are taken in float32 all the same")
    frozen = [n for n, p in named.items() if not p.requires_grad]
    return f"{len(named)} real tensors" + (f"; frozen: {names(frozen)}" if frozen else "")


def _blocks(s: Subject) -> str:
    """Check that the blocks are a partition; say their kinds, and how sure these are."""
    trainable = {n: p.numel() for n, p in s.model.named_parameters() if p.requires_grad}
    covered: dict[str, int] = dict.fromkeys(trainable, 0)
    for block in find_blocks(s.model, "all"):
        for part in block.parts:
            covered[part.parameter] += part.of(s.model.get_parameter(part.parameter)).numel()
    if odd := [n for n in trainable if covered[n] != trainable[n]]:
        raise Failed(f"the blocks don't cover {names(odd)} once; please report this model")
    found = draft.inspect_model(s.model, s.entry.blocks)
    if len(found.blocks) < 2:
        raise Failed(
            f"one block alone, {found.blocks[0].name}: there is nothing to compare it with; every "
            "trainable matrix is a block"
        )
    counts = Counter(b.kind for b in found.blocks)
    text = f"{len(found.blocks)} disjoint blocks: "
    text += ", ".join(f"{count} {kind}" for kind, count in counts.items())
    if s.entry.blocks:
        text += f"; kinds by the entry itself: {names([*s.entry.blocks])}"
    if found.tied:
        text += f"; tied: {names(found.tied)}"
    if unsure := _unsure(found, sum(trainable.values())):
        raise Caution(text + unsure)
    return f"{text}; all kinds known"


def _unsure(found: draft.Findings, num_params: int) -> str:
    """Say which kinds are guesses and what the entry can write, "" if none is."""
    text, kinds = "", found.guessed
    if kinds:
        listed = names([f"{name} ({kind})" for name, kind in kinds.items()])
        text += f"; guessed, since neither module nor name tells the kind: {listed}"
    if left_out := [b for b in found.unclassified if b.kind == "bias"]:
        share = sum(b.num_params for b in left_out) / num_params
        listed = names([b.name for b in left_out])
        text += f"; called biases, so in none of them: {listed}, {share:.0%} of the parameters"
        kinds |= {b.name: "mlp" for b in left_out}
    return text and f"{text}; the entry says what they are by blocks={json.dumps(kinds)}"


def _forward(s: Subject) -> str:
    with torch.no_grad(), fixed_arithmetic(s.model):
        try:
            logits = s.task.logits(s.model, s.mates)
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            if not (remedy := _remedy_of_size(s, error)):
                raise
            said = " ".join(str(error).split()) or type(error).__name__
            raise Failed(f"forward: {said}{locate.frame_of(error)}; {remedy}") from error
        if not isinstance(logits, torch.Tensor):
            raise Failed(
                f"forward returns {type(logits).__name__}; it must return the logits, a tensor (or "
                "an object with `logits`, or (logits, loss)), or the task override `logits`"
            )
        classes = s.data.model_options.get("num_classes") or s.data.model_options.get("vocab_size")
        if classes is not None and logits.shape[-1] != classes:
            raise Failed(
                f"forward returns {tuple(logits.shape)}; the last dimension must be the task's "
                f"{classes} classes: let the factory take "
                f"{'num_classes' if 'num_classes' in s.data.model_options else 'vocab_size'}"
            )
        loss = s.task.loss(s.model, s.mates)
        if not isinstance(loss, torch.Tensor) or loss.dim():
            what = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise Failed(
                f"`loss_of` of task {s.entry.task} returns {what}; it must return the mean over "
                "its terms, a scalar tensor: reduction='mean'"
            )
        if not torch.isfinite(loss):
            where = locate.not_finite(s.model, s.task.loss, s.mates) or "the loss"
            raise Failed(
                f"the loss is {float(loss)}: {where} makes it of finite inputs; look for log, "
                "sqrt or division of what can be zero or negative"
            )
    return f"logits {tuple(logits.shape)}, loss {loss.item():.4f}"


def _remedy_of_size(s: Subject, error: Exception) -> str:
    """Say what an author can do about inputs that a forward pass does not take, "" if unknown."""
    options = s.data.model_options
    if "image_size" in options:
        side = options["image_size"]
        return (
            f"if the network takes one size of images alone: those of the task are {side} × {side},"
            " and the task's option image_size resizes them ('digits?image_size=32')"
        )
    if isinstance(error, IndexError) and "vocab_size" in options:
        return (
            f"an embedding is too small: tokens are below vocab_size {options['vocab_size']}, "
            f"positions below context {options.get('context')}; let the factory take both, and of "
            "RoBERTa's kin leave pad_token_id out, or give max_position_embeddings = context + "
            "pad_token_id + 1"
        )
    return ""


def _terms(s: Subject) -> str:
    """Compare `num_terms` with those of parts of unlike size, and with the number of targets."""
    size = leading_size(s.mates)
    cuts = [0, max(1, size // 4), size]
    parts = [take(s.mates, a, b) for a, b in pairwise(cuts) if a < b]
    whole, counts = s.task.num_terms(s.mates), [s.task.num_terms(part) for part in parts]
    remedy = "let it count the terms that `loss_of` averages"
    if whole != sum(counts) or whole < 1:
        raise Failed(
            f"num_terms of task {s.entry.task} is {whole} for {size} samples, and "
            f"{' + '.join(map(str, counts))} for their parts; {remedy}, of the batch it is given"
        )
    targets = s.task.targets(s.mates)
    if targets is not None and len(targets) != whole:
        raise Failed(
            f"num_terms of task {s.entry.task} is {whole} for a batch of {len(targets)} targets; "
            f"{remedy}, or let `targets` return one of each term (None where they are no classes)"
        )
    return f"{whole} terms in {size} samples"


def _deterministic(s: Subject) -> str:
    model = copy.deepcopy(s.model)
    model.eval()
    with fixed_arithmetic(model):
        args = (model, s.task.loss, [s.mates], s.task.num_terms)
        check_deterministic(*args, batch_mates=False)
        if s.task.is_joint:
            return "two passes agree; samples depend on each other, as the task says"
        try:
            check_deterministic(*args, batch_mates=True)
        except UserError as error:
            where = locate.with_batch_mates(model, s.task.loss, s.mates)
            if where is None and "average to" not in str(error):
                raise
            if where is None:
                raise Failed(
                    f"{str(error).partition(':')[0]}, weighted by num_terms: let `loss_of` of task "
                    f"{s.entry.task} return the mean over its terms (a sum is none), and "
                    "`num_terms` count those that it averages, without what it leaves out. A loss "
                    "that compares samples (contrastive) says so: is_joint = True"
                ) from error
            training = [n for n, m in model.named_modules() if m.training]
            also = f"; eval() leaves {names(training)} in training mode" if training else ""
            raise Failed(
                f"samples depend on their batch mates in {where}{also}; use running statistics in "
                "evaluation mode (track_running_stats=True), or a norm over each sample"
            ) from error
    return "two passes agree, and halves with the whole batch"


def _training(s: Subject) -> str:
    if s.entry.trained_by is None:
        return "not trained: initialisation alone"
    model = copy.deepcopy(s.model)
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        loss = s.task.loss(model, s.mates)
        loss.backward()
    odd = [
        n
        for n, p in model.named_parameters()
        if p.grad is not None and not torch.isfinite(p.grad).all()
    ]
    if odd or not torch.isfinite(loss):
        raise Failed(
            f"in training mode the loss is {loss.item():.4g} and the gradient not finite in "
            f"{names(odd) or 'nothing'}; look at what differs in training mode"
        )
    return f"loss {loss.item():.4f} in training mode, finite gradients"


def _learns(s: Subject) -> str:
    """See whether AdamW gets the loss of few samples a tenth below R, that of nothing learnt."""
    if s.entry.trained_by is None:
        return "not trained: initialisation alone"
    entropy = target_entropy(s.task, s.mates)
    least = reference = reference_loss(s.entry, float("inf"), entropy)
    until, taken = s.time_for(0.5), 0
    for rate in _FIT_RATES:
        model = copy.deepcopy(s.model)
        model.train()
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), rate)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(SEED)
            for step in range(_FIT_STEPS + 1):
                loss = s.task.loss(model, s.mates)
                value = loss.item()
                if not step:
                    reference = reference_loss(s.entry, value, entropy)
                least = min(least, reference, value)  # of all rates
                if value <= 0.9 * reference:
                    found = f"loss {value:.3f} in {step} steps of few samples"
                    return f"{found}, R {reference:.3f}"
                if time.process_time() > until and taken >= _FEWEST_STEPS:
                    raise Caution(
                        f"for want of time {taken} steps alone: loss {least:.3f}, R, that of "
                        f"having learnt nothing, is {reference:.3f}; raise --budget"
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                taken += 1
    text = (
        f"in {_FIT_STEPS} steps of AdamW on {leading_size(s.mates)} samples the loss gets to "
        f"{least:.3f}, and R, that of having learnt nothing, is {reference:.3f}"
    )
    if least <= _NOTHING * reference:
        raise Caution(f"{text}: it learns slowly")
    raise Caution(
        f"{text}: it learns nothing; look whether inputs reach the outputs, whether parameters are "
        "frozen or detached, and how large initial values are"
    )


# In this order; each needs those named to have passed.
_CHECKS: dict[str, tuple[Callable[[Subject], str], tuple[str, ...]]] = {
    "entry": (_entry, ()),
    "data": (_data, ()),
    "size": (_size, ("data",)),
    "build": (_build, ("size",)),
    "parameters": (_parameters, ("build",)),
    "blocks": (_blocks, ("parameters",)),
    "forward": (_forward, ("parameters",)),
    "leaks": (leaks.leaks, ("forward",)),
    "terms": (_terms, ("forward",)),
    "deterministic": (_deterministic, ("terms",)),
    "second derivatives": (products.second_derivatives, ("deterministic",)),
    "cost": (products.cost, ("second derivatives",)),
    "symmetric": (products.symmetric, ("second derivatives",)),
    "differences": (products.differences, ("second derivatives",)),
    "dense": (products.dense, ("second derivatives",)),
    "training": (_training, ("forward",)),
    "learns": (_learns, ("training",)),
}
# Not begun once the time is over.
_LONG = ("symmetric", "differences", "dense")
