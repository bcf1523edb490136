"""Taiba11/ABC-CapsNet: as in the paper, with an epsilon of 1e-8."""

import torch
from torch import nn


def squash(s):
    n2 = s.square().sum(-1, keepdim=True)
    return n2 / (1 + n2) * s / (n2 + 1e-8).sqrt()


class DigitCapsuleLayer(nn.Module):
    """[B, I, D_in] -> [B, J, D_out]; softmax over the output capsules, logits per sample, full gradient."""

    def __init__(self, num_capsules, num_routes, in_dim, out_dim, routing_iterations=3):
        super().__init__()
        self.num_capsules, self.num_routes = num_capsules, num_routes
        self.routing_iterations = routing_iterations
        self.W = nn.Parameter(0.01 * torch.randn(1, num_routes, num_capsules, out_dim, in_dim))

    def forward(self, x):
        u = (self.W @ x[:, :, None, :, None]).squeeze(-1)  # [B, I, J, D_out]
        logits = torch.zeros(len(x), self.num_routes, self.num_capsules, 1, device=x.device)
        for t in range(self.routing_iterations):
            v = squash((logits.softmax(2) * u).sum(1, keepdim=True))
            if t < self.routing_iterations - 1:
                logits = logits + (u * v).sum(-1, keepdim=True)
        return v.squeeze(1)
