"""The examples run as they stand, on a tiny model."""

import importlib.util
import math
import sys

import pytest
from conftest import ROOT, tiny_model, tiny_tokenizer
from test_fused_trainers import need

EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small-model")
    tiny_model("llama").float().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@need("trl")
@pytest.mark.parametrize("name", EXAMPLES)
def test_example(monkeypatch, tmp_path, small_model, name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    more = [] if name == "plain_pytorch" else ["--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", [name, "--model", small_model, *more])
    found = module.main()
    if name == "plain_pytorch":
        losses = found
        assert losses[0] == pytest.approx(math.log(2), abs=1e-4)  # the policy is the reference; mean weight 1
        assert losses[-1] < losses[0]
    else:
        losses = [entry["loss"] for entry in found.state.log_history if "loss" in entry]
        assert len(losses) == 2 and all(0 < loss < 2 for loss in losses)
