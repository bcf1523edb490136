"""BaoBao0926/AlexCapsNet: XifengGuo's class and names, but with the full gradient."""

import torch
from torch import nn


class DenseCapsule(nn.Module):
    """[B, I, D_in] -> [B, J, D_out]; softmax over the output capsules, an epsilon beside the norm."""

    def __init__(self, in_num_caps, in_dim_caps, out_num_caps, out_dim_caps, device, routings=3):
        super().__init__()
        self.device, self.routings = device, routings
        self.weight = nn.Parameter(0.01 * torch.randn(out_num_caps, in_num_caps, out_dim_caps, in_dim_caps))

    def squash(self, s):
        n = torch.norm(s, dim=-1, keepdim=True)
        return s * (n**2 / (1 + n**2) / (n + 1e-8))

    def forward(self, x):
        u = torch.einsum("jidk,bik->bjid", self.weight, x)
        logits = torch.zeros(u.shape[:3]).to(self.device)
        for t in range(self.routings):
            v = self.squash((logits.softmax(1)[..., None] * u).sum(2))
            if t < self.routings - 1:
                logits = logits + torch.einsum("bjd,bjid->bji", v, u)
        return v
