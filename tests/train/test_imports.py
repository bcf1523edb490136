"""What the packages import."""

import pytest
from support.processes import python

pytestmark = pytest.mark.process

HEAVY = {"lightning", "matplotlib", "PIL", "rich", "sklearn", "tensorboard", "torchmetrics"}


def test_settings_and_data_need_no_extra():
    code = f"""
import sys
import fastcaps.data, fastcaps.train.settings, fastcaps.train.samples, fastcaps.train.evaluation
found = {HEAVY} & sys.modules.keys()
assert not found, found
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
