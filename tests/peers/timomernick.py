"""timomernick/pytorch-capsule, and FixCaps: squash over the output capsules, softmax over the inputs, shared logits."""

import torch
from torch import nn


def squash(s):
    n2 = (s * s).sum(dim=2, keepdim=True)  # of [B, 1, J, D_out, 1]: over J
    return n2 / (1 + n2) * (s / n2.sqrt())


class CapsuleLayer(nn.Module):
    """[B, D_in, I] -> [B, J, D_out, 1]; three iterations, always."""

    def __init__(self, in_units, in_channels, num_units, unit_size):
        super().__init__()
        self.in_channels, self.num_units = in_channels, num_units
        self.W = nn.Parameter(torch.randn(1, in_channels, num_units, unit_size, in_units))

    def forward(self, x):
        u = self.W @ x.transpose(1, 2)[:, :, None, :, None]  # [B, I, J, D_out, 1]
        b_ij = torch.zeros(1, self.in_channels, self.num_units, 1)
        for _ in range(3):
            v = squash((b_ij.softmax(dim=1).unsqueeze(4) * u).sum(dim=1, keepdim=True))
            b_ij = b_ij + (u.transpose(3, 4) @ v).squeeze(4).mean(dim=0, keepdim=True)
        return v.squeeze(1)


class Digits_Caps(CapsuleLayer):
    """The same layer under FixCaps's name."""
