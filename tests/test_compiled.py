"""Every kernel compiles for GPUs that are not there, in its registers, its shared memory and on the tensor cores."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("triton")
GPUS = ["cuda80", "cuda90", "cuda100", "cuda120", "gfx942", "gfx950"]
KERNELS = {"_fwd_kernel", "_merge_kernel", "_dz_kernel", "_matmul_kernel", "_slopes_kernel", "_preference_kernel"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What benchmarks/compiled.py finds, in a process of its own: this one may have an interpreter or a GPU."""
    out = tmp_path_factory.mktemp("compiled") / "compiled.json"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compiled", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize("gpu", GPUS)
def test_compiled(compiled, gpu):
    found = [row for row in compiled if row["gpu"] == gpu]
    assert {row["kernel"] for row in found} == KERNELS
    assert {model for row in found for model in row["models"]} >= {"llama-3.1-8b", "gemma-2-2b"}
    for row in found:
        assert row["spills"] == 0 and row["stack_bytes"] == 0, row
        assert row["shared"] <= row["shared_limit"], row
        assert row["num_tensor_core"] > 0 or not row["has_dot"], row
    assert {row["kernel"] for row in found if row["has_dot"]} == {"_fwd_kernel", "_dz_kernel", "_matmul_kernel"}


def test_the_row_pass_in_place_has_its_barrier(compiled):
    """Where the log-sum-exp is known nothing else in it would ask for one; the interpreter runs without."""
    assert all(row["barriers"] > 0 for row in compiled if row["kernel"] == "_slopes_kernel")


def test_offsets_are_64_bit(compiled):
    """In the IR of every kernel with a grid of programs, some product is taken in 64 bits before it moves a pointer."""
    assert all(row["int64_products"] > 0 for row in compiled if row["kernel"] != "_preference_kernel"), compiled
