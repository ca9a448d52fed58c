"""`--method FILE.py:NAME`: the worked example of docs/add-a-loss.md trains; the file's hash; clear refusals."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import ROOT, metrics, same_bits, weights_of

from ddpo import objective
from ddpo.cli import main
from ddpo.config import TrainConfig, training
from ddpo.train import train

HINGE = re.findall(r"```python\n(.*?)```", (ROOT / "docs/add-a-loss.md").read_text(), re.S)[0]


@pytest.fixture
def own(tmp_path):
    """(code) -> path of a file of that code."""

    def make(code, name="loss.py"):
        path = tmp_path / name
        path.write_text(code)
        return str(path)

    return make


def test_the_worked_example_trains(config, own):
    """Loss of step 0: 1 a pair, every margin being 0. The gradient moves the margin; weights multiply."""
    cfg = config(method=own(HINGE, "hinge.py") + ":hinge", weighted=True, batch_size=1000, epochs=3)
    train(cfg)
    first, *_, last = metrics(cfg)
    assert first["loss"] == pytest.approx(first["weight"] * first["pairs_forwarded"] / first["num_pairs"], abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-9) and last["rewards/margins"] > 0
    assert last["loss"] < first["loss"]


def test_a_copy_of_a_method_is_that_method(config):
    """ddpo.losses' own functions, named by their file: the same bits as by their names."""
    losses = str(ROOT / "ddpo/losses.py")
    for name, options in (("dpo", {"weighted": True}), ("simpo", {"beta": 2.0})):
        runs = [config(method=method, max_steps=2, **options) for method in (name, f"{losses}:{name}")]
        for cfg in runs:
            train(cfg)
        assert same_bits(*map(weights_of, runs))


def test_a_changed_file_is_refused(config, own, tmp_path):
    path = own(HINGE)
    cfg = config(method=f"{path}:hinge", max_steps=1)
    train(cfg)
    saved = yaml.safe_load((Path(cfg.out) / "config.yaml").read_text())
    assert saved["method_sha256"] == cfg.method_sha256 and len(cfg.method_sha256) == 64
    train(replace(cfg, resume=True))  # the same file: a finished run is left
    own(HINGE + "\n# another\n")
    with pytest.raises(ValueError, match=r"the file of method .* has changed since the run was started"):
        train(replace(cfg, resume=True, method_sha256=None))
    with pytest.raises(ValueError, match="has changed since method_sha256 was written"):
        TrainConfig(**saved | {"lora_targets": ("q_proj",), "track": ()})
    objective.own_loss.cache_clear()  # as in another process
    with pytest.raises(ValueError, match="was changed while the command ran"):
        objective.method_of(cfg)


@pytest.mark.parametrize(
    "code, message",
    [
        ("def loss(logp, pairs, scores): ...", "nothing is given to parameter 'scores'; give it a default"),
        ("def loss(logp, pairs, *rest): ...", "nothing is given to parameter 'rest'"),
        ("def loss(logp, pairs, /): ...", "parameters are given by name"),
        ("def loss(logp): ...", "got one without 'pairs'"),
        ("def other(logp, pairs): ...", "has no function 'loss'; functions there: other"),
        ("loss = 3", "has no function 'loss'; functions there: none"),
        ("def loss(logp, pairs:", "does not run as Python: SyntaxError"),
        ("import nowhere_at_all", "does not run as Python: ModuleNotFoundError"),
    ],
)
def test_files_that_are_refused(own, config, code, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        objective.method_of(config(method=own(code) + ":loss"))


def test_a_result_of_another_shape(own, config):
    cfg = config(method=own("def loss(logp, pairs):\n    return logp[pairs[:, 0]].mean()\n") + ":loss", max_steps=1)
    with pytest.raises(ValueError, match=r"must return a loss a pair, a tensor of shape \(P,\) = \(\d+,\), got \(\)"):
        train(cfg)


def test_options(own):
    given = {"data": "d", "out": "o"}
    path = own("def loss(logp, pairs): ...")
    with pytest.raises(ValueError, match=r"beta does nothing under method .*: the function has no parameter 'beta'"):
        objective.method_of(TrainConfig(method=f"{path}:loss", beta=0.2, **given))
    with pytest.raises(ValueError, match="gamma does nothing"):
        TrainConfig(method=f"{path}:loss", gamma=0.2, **given)
    with pytest.raises(ValueError, match=r"there is no file nowhere\.py"):
        TrainConfig(method="nowhere.py:loss", **given)
    with pytest.raises(ValueError, match=r"unknown method 'dddpo'; did you mean 'ddpo'"):
        TrainConfig(method="dddpo", **given)
    with pytest.raises(ValueError, match=r"or FILE\.py:NAME"):
        TrainConfig(method=path, **given)
    with pytest.raises(ValueError, match=r"method_sha256 is of a method FILE\.py:NAME"):
        TrainConfig(method_sha256="0", **given)
    assert set(training.METHODS) == set(objective.METHODS)


def test_the_file_is_not_run_by_reading_settings(own, tmp_path, capsys):
    """Only a command that trains or plans runs it."""
    path = own(f"open({str(tmp_path / 'seen')!r}, 'w')\ndef loss(logp, pairs): ...\n")
    cfg = TrainConfig(data="d", out="o", method=f"{path}:loss")
    assert not (tmp_path / "seen").exists()
    objective.method_of(cfg)
    assert (tmp_path / "seen").exists()
    with pytest.raises(SystemExit):
        main(["train", "d", "--out", "o", "--method", f"{path}:los"])
    assert "d" in capsys.readouterr().err


def test_formula_of_the_example():
    """TRL's hinge loss: relu(1 - beta (chosen log-ratio - rejected log-ratio))."""
    place = {}
    exec(HINGE, place)
    logp, ref = torch.randn(2, 4, dtype=torch.float64) - 50
    ratios = logp - ref
    want = F.relu(1 - 0.3 * (ratios[[0, 2]] - ratios[[1, 3]]))
    assert torch.allclose(place["hinge"](logp, ref, torch.tensor([[0, 1], [2, 3]]), beta=0.3), want)
