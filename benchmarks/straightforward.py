# Copyright 2026 The diffusers_lsep authors.
# SPDX-License-Identifier: Apache-2.0
"""LSEP done the straightforward way in plain PyTorch: what the benchmarks compare with.

The two streams run one after the other, the crop is a loop over the samples, and so is the weight by time. Parameters
have the names of the original checkpoints, so that `convert_original_checkpoint` can show that both sides compute the
same.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = MLP(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class PatchEmbedder(nn.Module):
    def __init__(self, channels, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class TimeEmbedder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class LabelEmbedder(nn.Module):
    def __init__(self, classes, width):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, y):
        return self.embedding_table(y)


class FinalLayer(nn.Module):
    def __init__(self, width, outputs):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        return self.linear(modulate(self.norm(x), *self.adaLN_modulation(c).chunk(2, dim=1)))


class StraightforwardSiT(nn.Module):
    def __init__(self, size, channels, patch, layers, width, heads, classes, probe_depth):
        super().__init__()
        self.patch, self.channels, self.classes, self.probe_depth = patch, channels, classes, probe_depth
        self.grid = size // patch
        self.x_embedder = PatchEmbedder(channels, width, patch)
        self.pos_embed = nn.Parameter(self.position_table(width), requires_grad=False)
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = LabelEmbedder(classes, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.final_layer = FinalLayer(width, patch * patch * channels)
        self.classifier = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))
        for parameter in self.parameters():
            if parameter.requires_grad:  # nothing zero: every path has work to do and a gradient
                nn.init.normal_(parameter, std=0.02)

    def position_table(self, width):
        rows, columns = torch.meshgrid(*[torch.arange(self.grid, dtype=torch.float64)] * 2, indexing="ij")
        frequencies = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
        parts = [f(axis.reshape(-1, 1) * frequencies) for axis in (columns, rows) for f in (torch.sin, torch.cos)]
        return torch.cat(parts, dim=1).float()[None]

    def tokens(self, x, t, y, depth):
        c = self.t_embedder(t) + self.y_embedder(y)
        x = self.x_embedder(x) + self.pos_embed
        for block in self.blocks[:depth]:
            x = block(x, c)
        return x, c

    def forward(self, x, t, y):
        x, c = self.tokens(x, t, y, None)
        x = self.final_layer(x, c).reshape(-1, self.grid, self.grid, self.patch, self.patch, self.channels)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), self.channels, *[self.grid * self.patch] * 2)


def straightforward_loss(model, draws, weights):
    """The loss of a batch with the arguments of `LSEPObjective.forward`, on the linear path."""
    latents, labels, t = draws["latents"], draws["class_labels"], draws["timesteps"]
    shaped = t[:, None, None, None]
    noisy = (1 - shaped) * latents + shaped * draws["noise"]
    target = draws["noise"] - latents

    main_labels = torch.where(draws["class_dropout_mask"], model.classes, labels)
    denoising = ((model(noisy, t, main_labels).float() - target) ** 2).mean()
    if weights is None:
        return denoising

    probe_labels = torch.where(draws["probe_dropout_mask"], model.classes, labels)
    tokens, _ = model.tokens(noisy, t, probe_labels, model.probe_depth)
    grids = tokens.reshape(len(tokens), model.grid, model.grid, -1)
    pooled = []
    for grid, (top, left, size) in zip(grids, draws["crop_window"].tolist()):
        pooled.append(grid[top : top + size, left : left + size].float().mean(dim=(0, 1)))
    logits = model.classifier(torch.stack(pooled)).float()
    losses = F.cross_entropy(logits, labels, reduction="none")
    edges = torch.linspace(0, 1, len(weights) + 1)
    weighted = torch.zeros_like(losses)
    for i, weight in enumerate(weights):
        inside = (t >= edges[i]) & ((t < edges[i + 1]) if i + 1 < len(weights) else True)
        weighted = weighted + torch.where(inside, weight * losses, 0.0)
    return denoising + weighted.mean()
