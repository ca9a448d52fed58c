"""The Triton kernels: tests/interpreted_*.py, in a process of its own.

Without a GPU the kernels run in Triton's interpreter, and Triton asks for that once, when it is first imported: the
process of the other tests, which has imported it, is no place for it. To see each test:
TRITON_INTERPRET=1 pytest tests/interpreted_linear_logp.py tests/interpreted_preference.py
"""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

pytest.importorskip("triton")
FILES = sorted(str(p) for p in (ROOT / "tests").glob("interpreted_*.py"))


def test_kernels():
    env = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # deterministic algorithms want it
    if not torch.cuda.is_available():
        env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *FILES]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout
