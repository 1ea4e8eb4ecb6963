"""Networks that a stranger might bring, good and bad; the tests copy this file into a registry."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812


class Encoder(nn.Module):
    """Embed the pixels' rows and encode them by torch's own Transformer, with class scores."""

    def __init__(self, num_classes: int, image_size: int, width: int = 16):
        super().__init__()
        self.embed = nn.Linear(image_size, width)
        layer = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images):
        return self.head(self.encoder(self.embed(images[:, 0])).mean(1))


class Perceptron(nn.Module):
    """A perceptron of one hidden layer, between them what subclasses put there."""

    def __init__(self, num_classes: int, image_size: int, width: int = 12):
        super().__init__()
        self.hidden = nn.Linear(image_size**2, width)
        self.middle = nn.Identity()
        self.head = nn.Linear(width, num_classes)

    def forward(self, images):
        return self.head(self.middle(torch.tanh(self.hidden(images.flatten(1)))))


def with_middle(middle):
    """Return a factory of the perceptron with a module in its middle."""

    def build(num_classes: int, image_size: int) -> nn.Module:
        network = Perceptron(num_classes, image_size)
        network.middle = middle(12)
        return network

    return build


def frozen(num_classes: int, image_size: int) -> nn.Module:
    network = Perceptron(num_classes, image_size)
    network.hidden.requires_grad_(False)
    network.middle = nn.Linear(12, 12)
    return network


class RandomMask(nn.Module):
    """Dropout that evaluation mode doesn't switch off."""

    def __init__(self, width: int):
        super().__init__()

    def forward(self, x):
        return F.dropout(x, 0.5)


class InPlace(nn.Module):
    """A custom function that saves memory where the second derivative needs it."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return _Tanh.apply(self.linear(x))


class _Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, g):
        h = torch.tanh(ctx.saved_tensors[0])
        return g * h.square_().neg_().add_(1)  # 1 - tanh², saving an allocation


class FusedAttention(nn.Module):
    """Calls the fused kernel itself, so that no context can choose another one."""

    def __init__(self, width: int):
        super().__init__()
        self.qkv = nn.Linear(1, 24)
        self.out = nn.Linear(8, 1)

    def forward(self, x):
        q, k, v = self.qkv(x[..., None])[:, None].chunk(3, -1)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return self.out(kernel(q, k, v)[0][:, 0])[..., 0]


class Rounded(nn.Module):
    """A custom function without a second derivative."""

    def __init__(self, width: int):
        super().__init__()

    def forward(self, x):
        return _Once.apply(x)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


class Logarithm(nn.Module):
    def __init__(self, width: int):
        super().__init__()

    def forward(self, x):
        return torch.log(x)


class BatchMates(nn.Module):
    """A batch norm without running statistics."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(width, track_running_stats=False)

    def forward(self, x):
        return self.norm(x)


class Straight(nn.Module):
    """A straight-through estimator: it rounds, and its gradient says that it doesn't."""

    def __init__(self, width: int):
        super().__init__()

    def forward(self, x):
        return x + (torch.round(8 * x) / 8 - x).detach()


class Detached(nn.Module):
    def __init__(self, width: int):
        super().__init__()

    def forward(self, x):
        return x * torch.exp(x.detach())


class Wrong(nn.Module):
    """A custom function whose backward forgets a factor."""

    def __init__(self, width: int):
        super().__init__()

    def forward(self, x):
        return _Cube.apply(x)


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x**2


class Kept(nn.Module):
    """Squares, with a right gradient that computes with a number which autograd doesn't follow."""

    def __init__(self, width: int):
        super().__init__()

    def forward(self, x):
        return _Square.apply(x)


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.slope = 2 * x
        return x.square()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.slope


class Saved(Kept):
    """The same as it should be."""

    def forward(self, x):
        return _SavedSquare.apply(x)


class _SavedSquare(_Square):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


class OwnGenerator(nn.Module):
    """Initialised by numpy, whose generator no seed of ours reaches."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)
        values = np.random.default_rng().normal(size=(width, width)) / width**0.5
        self.linear.weight = nn.Parameter(torch.tensor(values, dtype=torch.float32))

    def forward(self, x):
        return self.linear(x)


class Unused(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x


class Branch(nn.Module):
    """A residual branch whose last scale starts at zero."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return x + self.scale * self.linear(x)


class Matrix(nn.Module):
    """A weight that no module of torch owns."""

    def __init__(self, width: int):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x):
        return x @ self.matrix


class PairBias(nn.Module):
    """A matrix that is called a bias."""

    def __init__(self, width: int):
        super().__init__()
        self.pair_bias = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x):
        return x @ self.pair_bias


class Complex(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.filter = nn.Parameter(torch.randn(width // 2 + 1, dtype=torch.complex64))

    def forward(self, x):
        return torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=x.shape[-1])


class Integer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        order = torch.randperm(width)
        self.order = nn.Parameter(order, requires_grad=False)

    def forward(self, x):
        return x[:, self.order]


straight = with_middle(Straight)
detached = with_middle(Detached)
wrong = with_middle(Wrong)
kept = with_middle(Kept)
saved = with_middle(Saved)
own_generator = with_middle(OwnGenerator)
unused = with_middle(Unused)
zero_branch = with_middle(Branch)
dropout_on = with_middle(RandomMask)
in_place = with_middle(InPlace)
fused_attention = with_middle(FusedAttention)
once = with_middle(Rounded)
nan = with_middle(Logarithm)
batch_mates = with_middle(BatchMates)
matrix = with_middle(Matrix)
pair_bias = with_middle(PairBias)
complex_filter = with_middle(Complex)
integer_order = with_middle(Integer)


def zero_head(num_classes: int, image_size: int) -> nn.Module:
    network = Perceptron(num_classes, image_size)
    network.middle = nn.Linear(12, 12)
    nn.init.zeros_(network.head.weight)
    return network


class Float32Alone(nn.Linear):
    """Asserts the dtype that it was written for, as nanochat does."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)

    def forward(self, x):
        assert x.dtype == torch.float32, "float32 alone"
        return torch.tanh(super().forward(x))


float32_alone = with_middle(Float32Alone)


class Blind(nn.Module):
    """What it says has nothing to do with what it sees."""

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, x):
        return 0 * x


blind = with_middle(Blind)


def deep(num_classes: int, image_size: int) -> nn.Module:
    """Signals fade through thirty layers: the first blocks' Hessians are tiny, and have kinks."""
    network = Perceptron(num_classes, image_size)
    network.middle = nn.Sequential(
        *(nn.Sequential(nn.Linear(12, 12), nn.ReLU()) for _ in range(30))
    )
    return network


def raises(num_classes: int) -> nn.Module:
    raise FileNotFoundError("weights.pt is not there")


def needs_arguments(num_classes: int, width: int, *, depth: int) -> nn.Module:
    return nn.Linear(width * depth, num_classes)


def huge(num_classes: int, image_size: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(image_size**2, 10**11), nn.Linear(10**11, 10))


def huge_at_once(num_classes: int) -> nn.Module:
    """Can't be built on the meta device, for it reads numbers; and doesn't fit."""
    float(torch.ones(1))
    return nn.Linear(10**12, num_classes)


def no_module() -> dict:
    return {}


def wrong_classes(image_size: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(image_size**2, 7))


class Reader(nn.Module):
    """A language model of one attention, with a mask or without."""

    def __init__(self, vocab_size: int, context: int, mask: bool = True, width: int = 8):
        super().__init__()
        self.mask = mask
        self.embed, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(context, width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, tokens):
        h = self.embed(tokens) + self.positions.weight[: tokens.shape[1]]
        scores = self.q(h) @ self.k(h).mT
        if self.mask:
            scores = scores + torch.full_like(scores, -torch.inf).triu(1)
        return self.head(h + self.o(scores.softmax(-1) @ self.v(h)))


def unmasked(vocab_size: int, context: int) -> nn.Module:
    return Reader(vocab_size, context, mask=False)


def hidden_leak(vocab_size: int, context: int) -> nn.Module:
    """No mask, and an output of attention that starts at zero."""
    network = Reader(vocab_size, context, mask=False)
    nn.init.zeros_(network.o.weight)
    nn.init.zeros_(network.o.bias)
    return network


class BothSides(Reader):
    """A convolution over the token itself and its two neighbours."""

    def __init__(self, vocab_size: int, context: int):
        super().__init__(vocab_size, context)
        self.mix = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, tokens):
        return self.head(self.mix(self.embed(tokens).mT).mT)


class NanoGPT(Reader):
    """Returns (logits, loss): of the last position alone, unless it gets targets."""

    def forward(self, idx, targets=None):
        logits = super().forward(idx)
        if targets is None:
            return logits[:, [-1], :], None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


class ZeroStart(Reader):
    """As today's recipes begin: the head and the output of attention at zero."""

    def __init__(self, vocab_size: int, context: int):
        super().__init__(vocab_size, context)
        for layer in (self.head, self.o):
            nn.init.zeros_(layer.weight)


class LookupTooSmall(Reader):
    def __init__(self, vocab_size: int, context: int):
        super().__init__(vocab_size // 4, context)


class OneSize(nn.Module):
    """Takes images of 32 × 32 pixels alone."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.first, self.head = nn.Linear(1024, 8), nn.Linear(8, num_classes)

    def forward(self, images):
        return self.head(torch.tanh(self.first(images.flatten(1))))
