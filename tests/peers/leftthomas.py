"""leftthomas/CapsuleLayer: the last pass may stay without squash, and the coupling is returned too.

The layer of leftthomas/CapsNet is gram-ai's.
"""

import torch
from torch import nn


def squash(s):
    n = s.norm(dim=-1, keepdim=True)
    return n / (1 + n**2) * s


class CapsuleLinear(nn.Module):
    """[B, I, D_in] -> [B, J, D_out] and the coupling [B, J, I]; of its routings, the dynamic one."""

    def __init__(self, out_capsules, in_length, out_length, in_capsules=None, num_iterations=3, squash=False):
        super().__init__()
        self.num_iterations, self.squash = num_iterations, squash
        inputs = () if in_capsules is None else (in_capsules,)  # else shared over the input capsules
        self.weight = nn.Parameter(torch.empty(out_capsules, *inputs, out_length, in_length))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x):
        weight = self.weight if self.weight.dim() == 4 else self.weight[:, None]
        votes = (weight @ x[:, None, :, :, None]).squeeze(-1)  # [B, J, I, D_out]
        logits = torch.zeros_like(votes)
        for t in range(self.num_iterations):
            shares = logits.softmax(dim=1)
            s = (shares * votes).sum(dim=2)
            if t < self.num_iterations - 1:
                logits = logits + (votes * squash(s)[:, :, None]).sum(dim=-1, keepdim=True)
        return squash(s) if self.squash else s, shares.mean(dim=-1)
