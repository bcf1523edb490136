"""yongheng1991/3D-point-capsule-networks: detached, with a division by the norm alone."""

import torch
from torch import nn


class LatentCapsLayer(nn.Module):
    """[B, I, D_in] -> [B, J, D_out]; three iterations, always."""

    def __init__(self, latent_caps_size, prim_caps_size, prim_vec_size, latent_vec_size):
        super().__init__()
        self.W = nn.Parameter(0.01 * torch.randn(latent_caps_size, prim_caps_size, latent_vec_size, prim_vec_size))

    def squash(self, s):
        n2 = s.pow(2).sum(-1, keepdim=True)
        return s * n2 / ((1 + n2) * n2.sqrt())

    def forward(self, x):
        u = torch.einsum("jidk,bik->bjid", self.W, x)
        logits = torch.zeros(u.shape[:3])
        for votes in (u.detach(), u.detach(), u):
            v = self.squash((logits.softmax(1)[..., None] * votes).sum(2))
            logits = logits + (v[:, :, None] * u.detach()).sum(-1)
        return v
