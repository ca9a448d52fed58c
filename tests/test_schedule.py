"""What a step sees: components, shares of processes, packs; and a component that does not fit in one pass."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import STORIES, metrics, relative, weights_of
from hypothesis import given
from hypothesis import strategies as st

from ddpo import train
from ddpo.data.batches import consecutive, first_fit, share_out
from ddpo.items import Items
from ddpo.schedule import Schedule
from ddpo.train import train as run_training

sizes = st.lists(st.integers(1, 30), max_size=40)


@given(sizes, st.integers(1, 40))
def test_bins_hold_everything_once_and_have_room(sizes, room):
    bins = first_fit(sizes, room)
    assert sorted(i for b in bins for i in b) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in b) <= room or len(b) == 1 for b in bins)
    cuts = consecutive(np.array(sizes, int), room)
    assert cuts[0] == 0 and cuts[-1] == len(sizes) and (np.diff(cuts) > 0).all()
    runs = [sizes[a:b] for a, b in itertools.pairwise(cuts)]
    assert all(sum(run) <= room or len(run) == 1 for run in runs)
    assert all(sum(a) + b[0] > room for a, b in itertools.pairwise(runs)), "a run is as long as it can be"


@given(sizes, st.integers(1, 5))
def test_shares_are_nearly_equal(sizes, n):
    shares = share_out(sizes, n)
    assert sorted(i for s in shares for i in s) == list(range(len(sizes)))
    totals = [sum(sizes[i] for i in s) for s in shares]
    assert max(totals) - min(totals) <= max(sizes, default=0)


def test_components():
    pairs = np.array([[0, 1], [4, 5], [1, 2], [7, 8], [5, 4], [9, 8]])
    items, offsets, component = Items(pairs.ravel(), 2 * np.arange(7), np.ones(6)).components(10)
    assert component[0] == component[2] != component[4] == component[5] and component[7] == component[9]
    found = {frozenset(items[a:b].tolist()) for a, b in itertools.pairwise(offsets)}
    assert found == {frozenset({0, 2}), frozenset({1, 4}), frozenset({3, 5})}


@pytest.mark.parametrize("rule", ["all", "gap"])
def test_every_response_passes_once_an_epoch(config, make_prepared, rule):
    """Over all processes: each pair in one step, each response of a step in one pack; no batch over the budget."""
    data = make_prepared(pairs=rule)
    cfg = config(data=str(data.folder), batch_size=4, epochs=2, micro_tokens=130, forward_zero_weight=True)
    schedule = Schedule(data, cfg)
    per_epoch = schedule.num_steps // 2
    for epoch in range(2):
        seen, pairs = [], []
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            pairs += schedule.items(step).tolist()
            shares = [schedule.batches(step, rank, 3) for rank in range(3)]
            assert len({len(share) for share in shares}) == 1, "as many batches in every process"
            for batches in zip(*shares, strict=True):
                assert len({len(b.packs) for b in batches}) == 1, "and as many packs in each"
                for batch in batches:
                    seen += batch.responses.tolist()
                    assert all(len(p.input_ids) <= 130 for p in batch.packs)
        assert sorted(pairs) == list(range(len(data.pairs)))
        assert sorted(seen) == np.unique(data.pairs).tolist()
    orders = [[schedule.items(i).tolist() for i in range(e * per_epoch, (e + 1) * per_epoch)] for e in (0, 1)]
    assert orders[0] != orders[1]
    assert [Schedule(data, cfg).items(i).tolist() for i in range(per_epoch)] == orders[0]
    if rule == "gap":
        assert [len(schedule.items(i)) for i in range(per_epoch)] == [4] * (len(data.pairs) // 4) + [
            len(data.pairs) % 4
        ] * (len(data.pairs) % 4 > 0)


def test_groups_are_items(config, make_prepared):
    """Under GVPO: every prompt with two scores or more once an epoch, all its scored responses in one batch, the others
    in none."""
    groups = [*STORIES, ("Alone.", [("One.", 1)]), ("Two, one rated.", [("A b.", 1), ("C d.", None), ("E f.", 3)])]
    groups += [("None rated.", [("G h.", None), ("I j.", None)])]
    data = make_prepared(groups)
    cfg = config(data=str(data.folder), method="gvpo", batch_size=2, epochs=2, micro_tokens=60)
    schedule = Schedule(data, cfg)
    assert schedule.num_steps == 2 * 3 and [schedule.totals(i).num_items for i in range(3)] == [2, 2, 1]
    for epoch in range(2):
        seen = []
        for step in range(3 * epoch, 3 * epoch + 3):
            for batch in schedule.batches(step, 0, 2) + schedule.batches(step, 1, 2):
                for a, b in itertools.pairwise(batch.offsets.tolist()):
                    responses = batch.responses[batch.members[a:b]].numpy()
                    assert data.scores[responses].tolist() == batch.scores[a:b].tolist()
                    seen.append(tuple(responses.tolist()))
                assert sorted(batch.members.tolist()) == list(range(len(batch.responses)))
        assert sorted(seen) == [tuple(range(4 * g, 4 * g + 4)) for g in range(4)] + [(17, 19)]
    assert schedule.describe(0)["groups"] == [int(data.response_group[r[0]]) for r in schedule.describe(0)["responses"]]


def test_no_groups_to_learn_from(config, make_prepared):
    data = make_prepared([("A.", [("B c.", 1), ("D e.", None)]), ("F.", [("G h.", 2)])])
    with pytest.raises(ValueError, match="has no groups to learn from: no prompt has two responses with a score"):
        Schedule(data, config(data=str(data.folder), method="gvpo"))
    with pytest.raises(ValueError, match="has no pairs to learn from: scores equal or missing"):
        Schedule(data, config(data=str(data.folder)))


def gradients(cfg):
    state = train.setup(cfg, 0, 1, Path(cfg.out))
    state.optimizer.zero_grad = lambda set_to_none: None  # keep the gradients to look at
    for param in state.params.values():  # away from B = 0, where half of the gradient vanishes
        param.data += 0.1 * torch.sin(torch.arange(param.numel(), dtype=param.dtype)).view_as(param)
    result = train.step(state)
    return {n: p.grad for n, p in state.params.items()}, dict(
        zip(result["names"], result["values"].read(), strict=False)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "ddpo"},
        {"method": "dorpo", "nll_tokens": "all", "nll_mean": "tokens"},
        {"method": "ddpo", "lora": False},
        {"method": "sft"},
        {"method": "gvpo"},
    ],
    ids=str,
)
def test_two_passes_equal_one(config, changes):
    """A component over the budget: the same loss, metrics and gradient (float64, relative L2 at most 1e-9), packs
    within the budget, and every response forwarded once with gradient."""
    whole, parts = (config(batch_size=1000, max_grad_norm=0.0, micro_tokens=m, **changes) for m in (100_000, 60))
    if changes["method"] != "sft":
        batches = train.setup(parts, 0, 1, Path(parts.out)).schedule.batches(0)
        assert max(len(b.packs) for b in batches) > 1
        assert max(len(p.input_ids) for b in batches for p in b.packs) <= 60
    (one, of_one), (two, of_two) = map(gradients, (whole, parts))
    assert relative(two, one) < 1e-9
    for name, value in of_one.items():
        assert of_two[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name
    run_training(whole)
    run_training(parts)
    assert relative(weights_of(parts), weights_of(whole)) < 1e-9
    assert [m["loss"] for m in metrics(parts)] == pytest.approx([m["loss"] for m in metrics(whole)], rel=1e-9)


def test_dropout_is_replayed_in_the_second_pass(config, monkeypatch):
    """The log-probs of both passes are the same bits, and the draws differ from pack to pack."""
    cfg = config(batch_size=1000, micro_tokens=60, lora_dropout=0.5, max_steps=1)
    state = train.setup(cfg, 0, 1, Path(cfg.out))
    for name, param in state.params.items():
        if "lora_B" in name:
            param.data.fill_(0.3)
    seen = []
    hook = state.policy.register_forward_hook(lambda module, args, logp: seen.append((args[0], logp.detach().clone())))
    train.step(state)
    hook.remove()
    by_pack = {}
    for pack, logp in seen:
        by_pack.setdefault(id(pack), []).append(logp)
    twice = [logps for logps in by_pack.values() if len(logps) == 2]
    assert len(twice) > 2 and all(torch.equal(*logps) for logps in twice)
    state.policy.eval()
    assert not any(torch.equal(state.policy(pack), logp) for pack, logp in seen), "dropout was on"


def test_steps_after_the_last_epoch_fraction(config):
    schedule = Schedule(train.setup(config(), 0, 1, Path(config().out)).schedule.data, config(epochs=3))
    assert schedule.epoch(0) == 0 and schedule.epoch(schedule.num_steps) == 3
    assert np.all(np.diff([schedule.epoch(i) for i in range(schedule.num_steps + 1)]) > 0)
    assert Schedule(schedule.data, replace(config(epochs=3), max_steps=2)).num_steps == 2


def test_pack_size_by_itself(config, make_prepared):
    """Large enough for every component, and no larger than wanted; a number given is kept."""
    data = make_prepared()
    cfg = config(data=str(data.folder), micro_tokens=None, forward_zero_weight=True)
    largest = max(int(b.num_inputs) for i in range(4) for b in Schedule(data, replace(cfg, batch_size=1)).batches(i))
    assert 60 < largest < 1024
    assert Schedule(data, cfg, 1).micro_tokens == largest
    assert Schedule(data, cfg, 1024).micro_tokens == 1024 and Schedule(data, cfg).micro_tokens == 4096
    assert Schedule(data, replace(cfg, micro_tokens=77), 1024).micro_tokens == 77
    assert all(len(b.packs) == 1 for b in Schedule(data, cfg, 1).batches(0))
