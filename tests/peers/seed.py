"""The form this project grew from: one layer, capsule-major primary capsules, full gradient."""

import torch
from torch import nn


def squash(s):
    n2 = (s * s).sum(-1, keepdim=True)
    return s * n2 / (1 + n2) / (n2 + 1e-8).sqrt()


class Capsule(nn.Module):
    """[B, I, D_in] -> [B, J, D_out]; softmax over the output capsules, logits per sample."""

    def __init__(self, in_capsules, in_dim, out_capsules, out_dim, num_routing):
        super().__init__()
        self.in_capsules, self.in_dim = in_capsules, in_dim
        self.out_capsules, self.out_dim = out_capsules, out_dim
        self.num_routing = num_routing
        self.weights = nn.Parameter(0.01 * torch.randn(1, in_capsules, out_capsules, out_dim, in_dim))

    def forward(self, x):
        u = torch.einsum("ijod,bid->bijo", self.weights[0], x)
        b = u.new_zeros(u.shape[:3])
        for _ in range(self.num_routing):
            c = b.softmax(dim=2)
            v = squash(torch.einsum("bij,bijo->bjo", c, u))
            b = b + torch.einsum("bijo,bjo->bij", u, v)
        return v


class Network(nn.Module):
    def __init__(
        self,
        channels=1,
        size=28,
        kernel=9,
        stem=256,
        types=32,
        dim=8,
        classes=10,
        out_dim=16,
        stride=2,
        hidden=(512, 1024),
    ):
        super().__init__()
        self.types, self.dim = types, dim
        side = (size - 2 * kernel + 1) // stride + 1
        self.conv1 = nn.Conv2d(channels, stem, kernel)
        self.primary = nn.Conv2d(stem, types * dim, kernel, stride)
        self.digits = Capsule(types * side * side, dim, classes, out_dim, 3)
        self.decoder = nn.Sequential(
            nn.Linear(classes * out_dim, hidden[0]),
            nn.ReLU(),
            nn.Linear(hidden[0], hidden[1]),
            nn.ReLU(),
            nn.Linear(hidden[1], channels * size * size),
            nn.Sigmoid(),
        )

    def forward(self, images):
        maps = self.primary(self.conv1(images).relu())
        maps = maps.unflatten(1, (self.types, self.dim))  # channel type*dim + k is entry k of the pose
        poses = maps.permute(0, 1, 3, 4, 2).flatten(1, 3)
        v = self.digits(squash(poses))
        longest = v.norm(dim=2).argmax(dim=1)
        mask = nn.functional.one_hot(longest, v.shape[1]).to(v.dtype)
        return v, self.decoder((v * mask[:, :, None]).flatten(1))
