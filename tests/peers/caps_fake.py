"""tuanrpt/CapsFake: higgsfield's layer with an epsilon of 1e-7 and a device as an argument."""

import torch
from torch import nn


class DigitCaps(nn.Module):
    """[B, I, D_in] -> [B, J, D_out, 1]; three iterations, always."""

    def __init__(self, num_capsules, num_routes, in_channels, out_channels):
        super().__init__()
        self.num_routes, self.num_capsules = num_routes, num_capsules
        self.W = nn.Parameter(torch.randn(1, num_routes, num_capsules, out_channels, in_channels))

    def squash(self, s):
        n2 = (s * s).sum(-1, keepdim=True)  # of one entry
        return n2 * s / ((1 + n2) * (n2 + 1e-7).sqrt())

    def forward(self, x, device):
        u = torch.einsum("ijdk,bik->bijd", self.W[0], x)
        b = torch.zeros(self.num_routes, self.num_capsules).to(device)
        for t in range(3):
            v = self.squash((b.softmax(0)[..., None] * u).sum(1)[..., None])
            if t < 2:
                b = b + torch.einsum("bijd,bjd->bij", u, v[..., 0]).mean(0)
        return v
