"""`ddpo tune`: what it times, what it remembers, and that the kernels take it."""

import pytest
import torch
from conftest import case

from ddpo import tune
from ddpo.cli import main
from ddpo.ops import triton, tuned
from ddpo.ops.implementation import Call

f32 = torch.float32


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned.stored.cache_clear()
    yield
    tuned.stored.cache_clear()


def test_without_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit) as stop:
        main(["tune"])
    assert stop.value.code == 2 and "error: tune: wanted a GPU, found none" in capsys.readouterr().err


def test_medians_of_rounds_in_turn():
    """Choices are taken in turn, the first round does not count, a single slow run does not decide."""
    order = []

    def time_ms(work):
        work()
        first = len(order) <= len(tune.CHOICES)
        slow = len(order) == 2 * len(tune.CHOICES)  # one run of the last choice
        return 1000.0 if first or slow else float(tune.CHOICES.index(order[-1]) + 1)

    times = tune.time_choices(order.append, time_ms)
    assert times == {choice: float(i + 1) for i, choice in enumerate(tune.CHOICES)}
    assert order[: len(tune.CHOICES)] == tune.CHOICES == order[len(tune.CHOICES) : 2 * len(tune.CHOICES)]


def test_what_is_remembered_is_taken():
    default = tuned.Choice()
    assert tuned.choice("GPU A", f32, 64, 1000, False) == default == tuned.Choice("chunked", 256)
    tune.remember("GPU A", {tuned.key(f32, 64, 1000, False): {"path": "fused", "chunk_mib": 256}})
    tune.remember("GPU A", {tuned.key(f32, 64, 1000, True): {"path": "chunked", "chunk_mib": 64}})
    tune.remember("cpu", {tuned.key(f32, 4, 9, False): {"path": "fused", "chunk_mib": 256}})
    assert tuned.choice("GPU A", f32, 64, 1000, False) == tuned.Choice("fused", 256)
    assert tuned.choice("GPU A", f32, 64, 1000, True) == tuned.Choice("chunked", 64)
    assert tuned.choice("GPU B", f32, 64, 1000, False) == default == tuned.choice("GPU A", f32, 65, 1000, False)
    (hidden, head, _), targets, _ = case(5, 4, 9, torch.float32)
    call = Call(hidden, head, targets, None, 1.0, None, None, 0.0)
    frozen = (True, False, False)
    assert triton.fake(call, frozen)[1][0].shape == (5,), "the fused way keeps the log-sum-exps"
    assert triton.Path("chunked").fake(call, frozen)[1][0].shape == (5, 4)


def test_a_broken_file_is_said():
    tuned.file().parent.mkdir(parents=True)
    tuned.file().write_text("{")
    with pytest.raises(ValueError, match=r"tuned.json is not JSON .* run `ddpo tune` again"):
        tuned.choice("GPU A", f32, 64, 1000, False)
    tuned.file().write_text("[]")
    with pytest.raises(ValueError, match=r"tuned.json holds something else .* run `ddpo tune` again"):
        tuned.choice("GPU A", f32, 64, 1000, False)
