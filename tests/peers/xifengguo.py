"""XifengGuo/CapsNet-Pytorch: detached routing, flat primary capsules."""

import torch
import torch.nn.functional as F
from torch import nn


def squash(s):
    n = torch.norm(s, dim=-1, keepdim=True)
    return s * n**2 / (1 + n**2) / (n + 1e-8)


class DenseCapsule(nn.Module):
    """[B, I, D_in] -> [B, J, D_out]; only the last weighted sum is differentiated."""

    def __init__(self, in_num_caps, in_dim_caps, out_num_caps, out_dim_caps, routings=3):
        super().__init__()
        self.in_num_caps, self.in_dim_caps = in_num_caps, in_dim_caps
        self.out_num_caps, self.out_dim_caps = out_num_caps, out_dim_caps
        self.routings = routings
        self.weight = nn.Parameter(0.01 * torch.randn(out_num_caps, in_num_caps, out_dim_caps, in_dim_caps))

    def forward(self, x):
        votes = (self.weight * x[:, None, :, None, :]).sum(dim=-1)  # [B, J, I, D_out]
        fixed = votes.detach()
        logits = torch.zeros(len(x), self.out_num_caps, self.in_num_caps, device=x.device)  # no dtype, as there
        for t in range(1, self.routings + 1):
            share = F.softmax(logits, dim=1).unsqueeze(-1)
            if t == self.routings:
                return squash((share * votes).sum(dim=2))
            v = squash((share * fixed).sum(dim=2))
            logits = logits + (fixed * v.unsqueeze(2)).sum(dim=-1)


class PrimaryCapsule(nn.Module):
    def __init__(self, in_channels, types, dim, kernel, stride):
        super().__init__()
        self.dim = dim
        self.conv2d = nn.Conv2d(in_channels, types * dim, kernel, stride)

    def forward(self, x):
        # Flat view of NCHW: a pose is dim consecutive values of a feature map.
        return squash(self.conv2d(x).reshape(x.shape[0], -1, self.dim))


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
        first = size - kernel + 1
        second = (first - kernel) // stride + 1
        self.conv1 = nn.Conv2d(channels, stem, kernel)
        self.primarycaps = PrimaryCapsule(stem, types, dim, kernel, stride)
        self.digitcaps = DenseCapsule(types * second**2, dim, classes, out_dim)
        self.decoder = nn.Sequential(
            nn.Linear(classes * out_dim, hidden[0]),
            nn.ReLU(),
            nn.Linear(hidden[0], hidden[1]),
            nn.ReLU(),
            nn.Linear(hidden[1], channels * size**2),
            nn.Sigmoid(),
        )

    def forward(self, images):
        v = self.digitcaps(self.primarycaps(F.relu(self.conv1(images))))
        longest = torch.norm(v, dim=-1).max(dim=1).indices
        mask = torch.zeros_like(v[:, :, :1]).scatter(1, longest[:, None, None], 1.0)
        return v, self.decoder((v * mask).reshape(len(v), -1))
