"""The Triton kernels on the CPU, in Triton's interpreter, which has to be on before Triton is imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_backends_in_the_interpreter() -> None:
    """Forward and backward against the reference: masks and strides. The whole file takes minutes."""
    file = Path(__file__).parent / "test_backends.py"
    chosen = "triton and cpu and ((test_any_strides and float32) or (test_mask and bfloat16 and sum))"
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider", "-k", chosen]
    run = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-3000:]  # 5 where nothing was chosen
