"""Figures of reports: sizes that do not grow without end."""

import pytest
import torch

from fastcaps.train import figures

pytestmark = pytest.mark.train


def test_a_thousand_classes_fit_into_a_figure():
    figure = figures.confusion(torch.eye(1000, dtype=torch.int64))
    assert max(figure.get_size_inches()) <= 15
