"""Riroaki/CapsNet: softmax over the output capsules, detached, an epsilon beside the norm."""

import torch
from torch import nn


def squash(s):
    n2 = s.square().sum(-1, keepdim=True)
    return s * (n2 / (1 + n2)) / (n2.sqrt() + 1e-8)


class DigitCaps(nn.Module):
    """[B, I, D_in] -> [B, J, D_out]; all passes but the last are constant for the gradient."""

    def __init__(self, in_dim, in_caps, out_caps, out_dim, num_routing):
        super().__init__()
        self.in_caps, self.out_caps, self.num_routing = in_caps, out_caps, num_routing
        self.W = nn.Parameter(0.01 * torch.randn(1, out_caps, in_caps, out_dim, in_dim))

    def forward(self, x):
        u = torch.einsum("jidk,bik->bjid", self.W[0], x)
        fixed, b = u.detach(), torch.zeros(len(x), self.out_caps, self.in_caps, 1)  # no dtype, as there
        for _ in range(self.num_routing - 1):
            v = squash((b.softmax(1) * fixed).sum(2))
            b = b + fixed @ v[..., None]
        return squash((b.softmax(1) * u).sum(2))
