"""A model that does not run: the line, its tensors, the axis that is missing, and the layer to use instead."""

import pytest
import torch
from torch import nn

from fastcaps.convert import replace_capsules
from fastcaps.convert.failure import explain_failure

I, D_IN, J, D_OUT = 6, 4, 3, 8


class Capsule(nn.Module):
    """Votes ``[B, I, J, D_out]``; subclasses go wrong."""

    def __init__(self, in_capsules=I, in_dim=D_IN, out_capsules=J, out_dim=D_OUT, num_routing=2):
        super().__init__()
        self.num_routing = num_routing
        self.weights = nn.Parameter(torch.randn(1, in_capsules, out_capsules, out_dim, in_dim))

    def votes(self, x):
        return (self.weights @ x[:, :, None, :, None])[..., 0]


class NoEntries(Capsule):
    def forward(self, x):
        votes = self.votes(x)
        coupling = votes.new_zeros(votes.shape[:3]).softmax(2)
        return (coupling * votes).sum(1)


class OtherOrder(Capsule):
    def forward(self, x):
        votes = self.votes(x)
        other = votes.transpose(1, 2)
        return votes + other


class OtherInputs(Capsule):
    def __init__(self):
        super().__init__(in_capsules=9)

    def forward(self, x):
        return self.votes(x)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 2)

    def forward(self, x):
        flat = x.flatten(1)
        return self.layer(
            flat,
        )


class View(nn.Module):
    number = 5

    def forward(self, x):
        return x.view(len(x), self.number, -1)


class Einsum(nn.Module):
    def forward(self, x):
        a = x.mean(0)
        return torch.einsum("bij,bj->bi", x, a)


def failure(model, sample=None):
    try:
        model(torch.randn(5, I, D_IN) if sample is None else sample)
    except Exception as error:
        return explain_failure(error, model)
    raise AssertionError("it runs")


CASES = {
    NoEntries: ("coupling has no axis for D_out, axis 3 of votes (size 8)", "write coupling.unsqueeze(3) there"),
    OtherOrder: ("votes and other have the same axes in another order", "permute one of votes and other"),
    OtherInputs: ("an axis is I = 9 in self.weights and 6 in x[:, :, None, :, None]", "made for 9 input capsules"),
}


@pytest.mark.parametrize("kind", CASES)
def test_the_axis_that_does_not_fit(kind):
    evidence, fix = CASES[kind]
    found = failure(kind())
    assert evidence in found.text
    assert fix in found.fix


def test_the_line_its_tensors_and_the_layer_to_use_instead():
    found = failure(nn.Sequential(nn.Identity(), NoEntries()))
    assert found.path == "1"
    assert "RuntimeError: The size of tensor a" in found.text
    assert "test_failure.py:" in found.text
    assert "return (coupling * votes).sum(1)" in found.text
    assert "coupling [5, 6, 3] = [B, I, J], votes [5, 6, 3, 8] = [B, I, J, D_out]" in found.text
    assert "fastcaps.CapsuleLayer(6, 4, 3, 8, num_iterations=2)" in found.fix
    assert "poses [B, 6, 4]" in found.fix


def test_poses_as_columns():
    class Columns(NoEntries):
        def votes(self, x):
            return super().votes(x[..., 0])

    assert "it takes x.squeeze(-1)" in failure(Columns(), torch.randn(5, I, D_IN, 1)).fix


@pytest.mark.parametrize(
    ("model", "texts"),
    [
        (Linear(), ["return self.layer(flat)", "self.layer = Linear(in_features=5, out_features=2", "flat [5, 24]"]),
        (View(), ["x [5, 6, 4]", "self.number = 5"]),
        (Einsum(), ["x [5, 6, 4]", "a [6, 4]"]),
    ],
)
def test_other_lines_show_what_is_in_them(model, texts):
    found = failure(model)
    assert [text for text in texts if text not in found.text] == [], found.text
    assert found.fix == "mend that line"


def test_errors_without_a_line_of_the_user():
    found = failure(nn.Linear(3, 2))
    assert found.text.startswith("RuntimeError: mat1 and mat2 shapes")
    assert found.fix == "call it with what its forward takes"
    assert failure(Linear(), "three").text.startswith("AttributeError: 'str' object has no attribute 'flatten'")


def test_a_parameter_without_a_shape():
    class Uninitialised(Linear):
        def __init__(self):
            super().__init__()
            self.weight = nn.UninitializedParameter()

        def forward(self, x):
            return x @ self.weight

    found = failure(Uninitialised())
    assert found.text.startswith("ValueError: Attempted to use an uninitialized parameter")
    assert "x [5, 6, 4]" in found.text


def test_code_without_a_file():
    names = {"nn": nn}
    exec("class Typed(nn.Module):\n    def forward(self, x):\n        return x + x[:, :2]", names)
    found = failure(names["Typed"]())
    assert found.text.startswith("RuntimeError: The size of tensor a")
    assert found.path == ""


def test_replace_capsules_says_so():
    with pytest.raises(
        ValueError, match=r"the model cannot run on the sample: RuntimeError: .*coupling has no axis for D_out"
    ):
        replace_capsules(nn.Sequential(NoEntries()), torch.randn(5, I, D_IN))
