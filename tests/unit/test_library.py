"""Tests that the command line imports transformers without torch, and that nothing else is changed by it."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys
from pilot_jax.models.checkpoints import library
from pilot_jax.models.checkpoints.processors import load_image_processor, load_tokenizer
from pilot_jax.models.packaged import ASSETS
if {hides}:
    library.leave_out_torch()
tokenizer, processor = load_tokenizer(ASSETS / "base"), load_image_processor(ASSETS / "base", "clip")
print(tokenizer("a red 3").input_ids, type(processor).__name__, "torch" in sys.modules)
import torch
print(torch.ones(1).item())
"""


@pytest.mark.slow
def test_torch_is_left_out_and_can_still_be_imported():
    out = [subprocess.run([sys.executable, "-c", CODE.format(hides=hides)], capture_output=True, text=True, check=True)
           .stdout.splitlines() for hides in (False, True)]
    (with_torch, one), (without, other) = out
    assert with_torch.endswith(" True") and without == with_torch.removesuffix("True") + "False"
    assert one == other == "1.0"
