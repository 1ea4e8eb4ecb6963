"""A Transformer layer, and the GPT and ViT made of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017) with query, key and value apart."""

    def __init__(
        self, width: int, num_heads: int, *, causal: bool, bias: bool, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is not a multiple of num_heads {num_heads}")
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width, bias=bias)
        self.value = nn.Linear(width, width, bias=bias)
        self.proj = nn.Linear(width, width, bias=bias)
        self.num_heads = num_heads
        self.causal = causal
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)
        heads = (self.num_heads, x.shape[-1] // self.num_heads)
        q, k, v = (
            f(x).unflatten(-1, heads).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=self.causal
        )  # (B, H, T, C / H)
        return self.proj(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention and a two-layer perceptron, each with a norm and a residual connection.

    The norm stands before the branch (pre-norm) or after the sum (post-norm, as in the original).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        causal: bool,
        bias: bool = True,
        pre_norm: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, bias=bias)
        self.attn = Attention(width, num_heads, causal=causal, bias=bias, dropout=dropout)
        self.norm2 = nn.LayerNorm(width, bias=bias)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width, bias=bias),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=bias),
        )
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def forward(self, x: Tensor) -> Tensor:
        if self.pre_norm:
            x = x + self.dropout(self.attn(self.norm1(x)))
            return x + self.dropout(self.mlp(self.norm2(x)))
        x = self.norm1(x + self.dropout(self.attn(x)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class GPT(nn.Module):
    """A decoder-only language model in the shape of GPT-2 (Radford et al. 2019).

    Weights start at N(0, std²), those that end a residual branch at std / √(2 layers).

    Args:
        vocab_size: Size of the vocabulary.
        context: Longest sequence.
        num_layers: Number of layers.
        num_heads: Heads of each layer.
        width: Width of the residual stream.
        tied: Share the weight of embedding and head.
        bias: Biases in linear layers and norms.
        dropout: Probability of dropout after the embeddings, in attention and after each branch.
        init_std: std; GPT-2's is 0.02, at a width of 768.
    """

    def __init__(
        self,
        vocab_size: int,
        context: int,
        *,
        num_layers: int,
        num_heads: int,
        width: int,
        tied: bool = True,
        bias: bool = False,
        dropout: float = 0.0,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab_size, width)
        self.wpe = nn.Embedding(context, width)
        self.h = nn.ModuleList(
            Layer(width, num_heads, causal=True, bias=bias, dropout=dropout)
            for _ in range(num_layers)
        )
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width, bias=bias)
        self.lm_head = nn.Linear(width, vocab_size, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                last = name.endswith(("attn.proj", "mlp.2"))
                std = init_std / (2 * num_layers) ** 0.5 if last else init_std
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, V)
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        x = self.dropout(x)
        for layer in self.h:
            x = layer(x)
        return self.lm_head(self.norm(x))


class ViT(nn.Module):
    """A vision Transformer (Dosovitskiy et al. 2021) that averages its tokens.

    Weights start as torch draws them: at these widths N(0, 0.02²) would leave the signal to the
    residual stream alone, and nothing would be learnt in a few hundred steps.

    Args:
        image_size: Side of the square image.
        in_channels: Channels of the image.
        num_classes: Number of classes.
        patch_size: Side of a patch; divides image_size.
        num_layers: Number of layers.
        num_heads: Heads of each layer.
        width: Width of the residual stream.
        pre_norm: Norm before each branch, or after each sum.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        num_classes: int,
        *,
        patch_size: int,
        num_layers: int,
        num_heads: int,
        width: int,
        pre_norm: bool = True,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is no multiple of patch_size {patch_size}")
        self.patch_embed = nn.Conv2d(in_channels, width, patch_size, patch_size)
        self.pos_embed = nn.Parameter(torch.randn(1, (image_size // patch_size) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(
            *(Layer(width, num_heads, causal=False, pre_norm=pre_norm) for _ in range(num_layers))
        )
        self.norm = nn.LayerNorm(width) if pre_norm else nn.Identity()
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) -> (B, K)
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed
        return self.head(self.norm(self.blocks(x)).mean(1))
