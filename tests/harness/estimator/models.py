"""Small real architectures and batches, shared by the estimator's tests."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812


class Attention(nn.Module):
    """Causal self-attention with one fused weight, as timm spells it."""

    def __init__(self, width: int, num_heads: int, causal: bool):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.num_heads, self.causal = num_heads, causal

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class Layer(nn.Module):
    def __init__(self, width: int, num_heads: int, causal: bool):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, num_heads, causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Two layers, tied embedding and head."""

    def __init__(self, vocab_size: int = 11, context: int = 6, width: int = 8):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, width), nn.Embedding(context, width)
        self.h = nn.ModuleList(Layer(width, 2, causal=True) for _ in range(2))
        self.lm_head = nn.Linear(width, vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.h:
            x = layer(x)
        return self.lm_head(x)


class ViT(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.patch_embed = nn.Conv2d(1, width, 2, 2)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 10, width) * 0.02)
        self.blocks = nn.Sequential(Layer(width, 2, causal=False))
        self.head = nn.Linear(width, 4)

    def forward(self, images):
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.blocks(x)[:, 0])


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(24, 4),
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 7), nn.Tanh(), nn.Linear(7, 4))


def cross_entropy(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    x, y = batch
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten(), ignore_index=-100)


def num_terms(batch: tuple[torch.Tensor, torch.Tensor]) -> int:
    return int((batch[1] != -100).sum())


def problem(name: str, num_samples: int = 6):
    """Return (model, batch) in float64; the text batch has ignored targets."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = {"cnn": cnn, "vit": ViT, "gpt": GPT, "mlp": mlp}[name]().double()
    if name == "gpt":
        x = torch.randint(11, (num_samples, 6), generator=generator)
        y = torch.randint(11, (num_samples, 6), generator=generator)
        y[torch.rand(y.shape, generator=generator) < 0.3] = -100
    else:
        x = torch.randn(num_samples, 1, 6, 6, generator=generator, dtype=torch.float64)
        y = torch.randint(4, (num_samples,), generator=generator)
    return model, (x, y)


def split(batch, sizes):
    """Split a batch of tensors into microbatches of the given sizes."""
    return list(zip(*(t.split(sizes) for t in batch), strict=True))
