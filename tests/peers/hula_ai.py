"""hula-ai/capsule_network_dynamic_routing: detached, an epsilon of 1e-7; its network squeezes the output."""

import torch
from torch import nn


def squash(s, dim):
    n2 = s.square().sum(dim, keepdim=True)
    return n2 / (1 + n2) * (s / (n2 + 1e-7).sqrt())


class DigitCapsLayer(nn.Module):
    """[B, I, D_in] -> [B, 1, J, D_out, 1]."""

    def __init__(self, num_digit_cap, num_prim_cap, in_cap_dim, out_cap_dim, num_iterations):
        super().__init__()
        self.num_iterations = num_iterations
        self.W = nn.Parameter(0.01 * torch.randn(1, num_prim_cap, num_digit_cap, out_cap_dim, in_cap_dim))

    def forward(self, x):
        u = self.W @ x[:, :, None, :, None]  # [B, I, J, D_out, 1]
        logits = torch.zeros(*u.shape[:3], 1, 1)
        for _ in range(self.num_iterations - 1):
            v = squash((logits.softmax(2) * u.detach()).sum(1, keepdim=True), -2)
            logits = logits + (u.detach() * v).sum(-2, keepdim=True)
        return squash((logits.softmax(2) * u).sum(1, keepdim=True), -2)
