"""laubonghaudoi/CapsNet_guide_PyTorch: as in the paper; the number of iterations is an option of the program."""

import torch
from torch import nn


class DigitCaps(nn.Module):
    """[B, I, D_in] -> [B, J, D_out]; there the sizes are constants."""

    def __init__(self, opt, I, J, D_in, D_out):
        super().__init__()
        self.opt = opt
        self.W = nn.Parameter(torch.randn(1, I, J, D_in, D_out))

    def squash(self, s):
        n = torch.sqrt(torch.sum(s**2, dim=2))
        return s * (n**2 / (n * (1 + n**2)))[..., None]

    def forward(self, u):
        votes = (u[:, :, None, None, :] @ self.W).squeeze(3)  # [B, I, J, D_out]
        b = torch.zeros(*votes.shape[:3], 1)
        for _ in range(self.opt.r):
            v = self.squash(torch.sum(votes * torch.softmax(b, dim=2), dim=1))
            b = b + torch.sum(votes * v[:, None], dim=3, keepdim=True)
        return v
