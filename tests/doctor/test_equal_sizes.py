"""The doctor of networks that have several axes of one size, which are not mixed up."""

import pytest
import torch
from peers import adambielski, seed
from support.networks_to_examine import BATCH, INPUTS, SHAPE, SMALL, SOFTMAX, SQUASH, first, look, plant, sample, wrong
from torch import nn

import fastcaps
from fastcaps.convert import replace_capsules
from fastcaps.doctor import FINE, WRONG, examine
from fastcaps.doctor.targets import random_sample


@pytest.mark.train
@pytest.mark.parametrize("B", [6, 10])  # D_out and J
def test_a_batch_as_large_as_another_axis(B):
    model = seed.Network(**SMALL)
    plant(model, "batch")
    assert wrong(examine(model, torch.rand(B, *SHAPE))) == {BATCH}
    model.digits.__class__ = seed.Capsule
    assert wrong(examine(model, torch.rand(B, *SHAPE))) == set()


@pytest.mark.train
@pytest.mark.parametrize("B", [6, 10])  # D_out and J
def test_a_model_for_one_batch_size_that_is_as_large_as_another_axis(B):
    class Fixed(seed.Network):
        def forward(self, images):
            assert len(images) == B
            return super().forward(images)

    model = Fixed(**SMALL)
    assert wrong(examine(model, torch.rand(B, *SHAPE))) == set()
    plant(model, "batch")
    assert wrong(examine(model, torch.rand(B, *SHAPE))) == {BATCH}


@pytest.mark.train
def test_random_samples_are_enough_also_where_parameters_have_their_number():
    model = nn.Sequential(nn.Flatten(), nn.Linear(35, 7), nn.Linear(7, 5))
    assert wrong(look(model, (1, 5, 7))) == set()


@pytest.mark.parametrize("mistake", ["none", "squash"])
def test_as_many_output_capsules_as_entries_of_a_pose(mistake):
    """J = D_out = 10: only its place tells the axis that squash takes the norm of."""
    model = seed.Network(**{**SMALL, "out_dim": 10})
    plant(model, mistake)
    finding = first(SQUASH, model, sample())
    assert finding.verdict == (FINE if mistake == "none" else WRONG), str(finding)


def test_as_many_input_capsules_as_entries_of_a_pose():
    """I = D_in = 16."""
    for module in (seed.Network, adambielski.Network):
        model = module(**{**SMALL, "types": 1, "dim": 16})
        assert first(INPUTS, model, sample()).verdict == FINE
        replace_capsules(model, random_sample(model, SHAPE), measure=False)
        assert first(INPUTS, model, sample()).verdict == FINE
    model = fastcaps.CapsNet(SHAPE, 10, kernel_size=3, stem_channels=5, types=1, primary_dim=16)
    assert model.capsules.weight.shape[0] == 16
    assert first(INPUTS, model, sample()).verdict == FINE


@pytest.mark.parametrize(("axis", "verdict"), [(1, WRONG), (2, FINE)])
def test_as_many_input_capsules_as_entries_of_an_output_pose(axis, verdict):
    """Votes [B, 48, 10, 48]: an axis of 48 in the output need not be that of the output capsules."""

    class Route(nn.Module):
        def forward(self, votes):
            logits = votes.new_zeros(votes.shape[:3])
            for _ in range(2):
                s = (logits.softmax(axis)[..., None] * votes).sum(1)
                v = fastcaps.squash(s)
                logits = logits + (votes * v[:, None]).sum(-1)
            return v

    class Layer(seed.Capsule):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.route = Route()

        def forward(self, x):
            return self.route(torch.einsum("ijod,bid->bijo", self.weights[0], x))

    model = seed.Network(**{**SMALL, "out_dim": 48})
    model.digits = Layer(48, 4, 10, 48, 2)
    finding = first(SOFTMAX, model, sample())
    assert finding.verdict == verdict, str(finding)
