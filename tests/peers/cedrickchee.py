"""cedrickchee/capsule-net-pytorch: poses come as [B, D_in, I], logits are shared by the batch (a mistake)."""

import torch
from torch import nn


def squash(s, axis):
    n = torch.linalg.vector_norm(s, dim=axis, keepdim=True)
    return n**2 / (1 + n**2) * (s / n)


class CapsuleLayer(nn.Module):
    """With routing: [B, D_in, I] -> [B, J, D_out, 1]. Without: images -> [B, num_unit, capsules]."""

    def __init__(
        self,
        in_unit,
        in_channel,
        num_unit,
        unit_size,
        use_routing,
        num_routing,
        cuda_enabled=False,
        out_channels=32,
        kernel_size=9,
        stride=2,
    ):
        super().__init__()
        self.in_unit, self.in_channel, self.num_unit = in_unit, in_channel, num_unit
        self.use_routing, self.num_routing, self.cuda_enabled = use_routing, num_routing, cuda_enabled
        if use_routing:
            self.weight = nn.Parameter(torch.randn(1, in_channel, num_unit, unit_size, in_unit))
        else:
            convs = [nn.Conv2d(in_channel, out_channels, kernel_size, stride) for _ in range(num_unit)]
            self.conv_units = nn.ModuleList(convs)

    def forward(self, x):
        return self.route(x) if self.use_routing else self.primary(x)

    def primary(self, x):
        maps = torch.stack([conv(x) for conv in self.conv_units], dim=1)
        return squash(maps.flatten(2), axis=2)  # over the capsules, where the paper has the pose

    def route(self, x):
        flat = self.weight[0].flatten(1, 2)  # [I, J * D_out, D_in]
        u = torch.bmm(flat, x.permute(2, 1, 0))  # [I, J * D_out, B]
        u = u.permute(2, 0, 1).unflatten(2, (self.num_unit, -1))  # [B, I, J, D_out]
        b = torch.zeros(1, self.in_channel, self.num_unit, 1, dtype=x.dtype, device=x.device)
        for _ in range(self.num_routing):
            c = b.softmax(dim=2)
            v = squash((c * u).sum(dim=1), axis=2)
            agreement = (u * v[:, None]).sum(dim=3, keepdim=True)  # [B, I, J, 1]
            b = b + agreement.sum(dim=0, keepdim=True) / x.shape[0]
        return v[..., None]


class Conv(nn.Module):
    def __init__(self, channels, stem, kernel):
        super().__init__()
        self.conv0 = nn.Conv2d(channels, stem, kernel)

    def forward(self, x):
        return self.conv0(x).clamp(min=0)


class Decoder(nn.Module):
    def __init__(self, n_in, hidden, n_out):
        super().__init__()
        self.fc1 = nn.Linear(n_in, hidden[0])
        self.fc2 = nn.Linear(*hidden)
        self.fc3 = nn.Linear(hidden[1], n_out)

    def forward(self, v):
        lengths = torch.linalg.vector_norm(v, dim=2)
        kept = v.where((lengths.argmax(dim=1)[:, None] == torch.arange(v.shape[1], device=v.device))[..., None], 0)
        return self.fc3(self.fc2(self.fc1(kept.flatten(1)).relu()).relu()).sigmoid()


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
        edge = (size - 2 * (kernel - 1) - 1) // stride + 1
        capsules = types * edge * edge
        self.conv1 = Conv(channels, stem, kernel)
        self.primary = CapsuleLayer(
            0, stem, dim, capsules, False, 0, out_channels=types, kernel_size=kernel, stride=stride
        )
        self.digits = CapsuleLayer(dim, capsules, classes, out_dim, True, 3)
        self.decoder = Decoder(classes * out_dim, hidden, channels * size * size)

    def forward(self, images):
        v = self.digits(self.primary(self.conv1(images)))[..., 0]
        return v, self.decoder(v)
