"""The reward model: targets, what it reads, training to the end and after a kill; scores whatever the batch."""

import math

import numpy as np
import pytest
import torch
from conftest import STORIES, tiny_tokenizer, write_groups

from ddpo.config import RewardConfig, ScoreConfig
from ddpo.data.groups import Group, Response, read_jsonl
from ddpo.files import read_json
from ddpo.reward import _last_checkpoint, evaluate, reward, split
from ddpo.reward_model import Reader, RewardModel, Target, batches_by_length, tagged
from ddpo.score import score


def test_target_of_votes():
    """By hand: t = s - min + 1, a hundred times ln(t + 1), then min-max to [-1, 1]."""

    def flat(t):
        for _ in range(100):
            t = math.log(t + 1)
        return t

    scores = np.array([-3.0, 0.0, 5.0, 400.0])
    low, high = flat(1.0), flat(404.0)
    wanted = [2 * (flat(s + 4) - low) / (high - low) - 1 for s in scores]
    target = Target.fit("votes", scores)
    np.testing.assert_allclose(target(scores), wanted, rtol=0, atol=1e-9)
    assert target(scores)[0] == -1 and target(scores)[-1] == 1 and (np.diff(target(scores)) > 0).all()
    assert target([-50, 9999]).tolist() == [-1, 1]  # a held-out score outside the range counts as its end
    assert Target.fit("linear", scores)([198.5]) == pytest.approx(0)
    with pytest.raises(ValueError, match="all scores are 2"):
        Target.fit("votes", np.array([2.0, 2.0]))


def test_what_it_reads():
    assert tagged("Q", "A") == "<prompt>Q</prompt><response>A</response>"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q"}]
    assert tagged(messages, "A") == "<prompt>Be brief.\nQ</prompt><response>A</response>"
    tokenizer, group = tiny_tokenizer(), Group("Q", [Response("A"), Response("long " * 50)], "here")
    ids = Reader(tokenizer, 60)(group)
    assert tokenizer.decode(ids[0]) == tagged("Q", "A") and len(ids[1]) == 60
    chat = tokenizer.decode(Reader(tokenizer, 60, chat=True)(group)[0])
    assert chat == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>"


def test_batches_by_length():
    batches = batches_by_length([5, 1, 9, 2, 30, 2], 10)
    assert batches == [[1, 3, 5], [0], [2], [4]]
    assert batches_by_length([], 10) == []


def test_evaluation_by_hand():
    groups = [
        Group("a", [Response("x", 1), Response("y", 2), Response("z", 3)], "1"),
        Group("b", [Response("x", 2), Response("y", 2)], "2"),
    ]
    rewards = np.array([-0.5, 0.6, 0.5, 0.0, 0.1])
    found = evaluate(rewards, groups, Target("linear", 1, 3))
    assert found["spearman_within_prompts"] == pytest.approx(0.5)  # prompt b says nothing
    assert found["pair_accuracy"] == pytest.approx(2 / 3)
    assert found["mae"] == pytest.approx(np.mean([0.5, 0.6, 0.5, 0.0, 0.1]))
    assert found["mae_of_the_median"] == pytest.approx(0.4)
    assert [b["predicted"] for b in found["calibration"]] == sorted(rewards)
    of_pairs = evaluate(rewards, groups, None)
    assert "mae" not in of_pairs and sum(b["count"] for b in of_pairs["calibration"]) == 6
    assert [b["observed"] for b in of_pairs["calibration"]] == [
        0,
        0,
        1,
        0,
        1,
        1,
    ]  # by probability


def config(source, model, out, **changes):
    usual = {"epochs": 2, "batch_size": 4, "lr": 1e-2, "holdout": 0.25, "max_length": 200, "lora_r": 2}
    return RewardConfig(**{**usual, "source": str(source), "model": model, "out": str(out), **changes})


@pytest.mark.parametrize("loss", ["l1", "bradley-terry"])
def test_train_score_and_again(loss, model_folder, tmp_path, capsys):
    """One command each; finished work is not done twice; scores are the model's whatever the batch."""
    groups = write_groups(tmp_path / "groups.jsonl")
    cfg = config(groups, model_folder, tmp_path / "run", loss=loss)
    run = reward(cfg)
    found = read_json(run / "evaluation.json")
    assert found["num_prompts"] == 1 and found["num_responses"] == 4 and ("mae" in found) == (loss == "l1")
    assert "<svg" in (run / "calibration.svg").read_text()
    assert read_json(run / "adapter" / "reward.json")["loss"] == loss
    with pytest.raises(FileExistsError, match="--resume"):
        reward(cfg)
    capsys.readouterr()
    reward(config(groups, model_folder, tmp_path / "run", loss=loss, resume=True))
    assert "finished already" in capsys.readouterr().out

    outs = []
    for max_tokens in (1, 4096):
        out = tmp_path / f"scored{max_tokens}.jsonl"
        scoring = {"responses": str(groups), "reward": str(run), "dtype": "float64", "max_tokens": max_tokens}
        score(ScoreConfig(**scoring, out=str(out)))
        outs.append([r["reward"] for _, row in read_jsonl(out) for r in row["responses"]])
    np.testing.assert_allclose(outs[0], outs[1], rtol=0, atol=1e-9)
    assert len(outs[0]) == 16 and np.std(outs[0]) > 0
    held_out = RewardModel.load(str(run), "float64", torch.device("cpu"))
    again = held_out([Group(p, [Response(t, s) for t, s in r], "") for p, r in STORIES])
    np.testing.assert_allclose(outs[0], again, rtol=0, atol=1e-9)


def test_training_goes_on_after_a_kill(model_folder, tmp_path, monkeypatch):
    """Stopped after its first epoch and resumed, it ends with the weights of a run that was not."""
    from safetensors.torch import load_file

    from ddpo.reward import Tell

    groups = write_groups(tmp_path / "groups.jsonl")
    straight = reward(config(groups, model_folder, tmp_path / "straight"))
    epochs = []

    def killed(self, args, state, control, **_):
        epochs.append(round(state.epoch))
        if len(epochs) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tell, "on_save", killed, raising=False)
        with pytest.raises(KeyboardInterrupt):
            reward(config(groups, model_folder, tmp_path / "stopped"))
        resumed = reward(config(groups, model_folder, tmp_path / "stopped", resume=True))
    assert epochs == [1, 2]  # the first epoch was not done again
    a, b = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (straight, resumed))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_prompts_to_measure_on_are_not_learned_from(model_folder, tmp_path):
    """Not even where the source holds them too."""
    source = write_groups(tmp_path / "groups.jsonl")
    held_out = write_groups(tmp_path / "heldout.jsonl", STORIES[1:3])
    train, stop, measured = split(config(source, model_folder, "run", eval_data=str(held_out), holdout=0.0))
    assert [g.prompt for g in train] == [STORIES[0][0], STORIES[3][0]]
    assert [g.prompt for g in measured] == [STORIES[1][0], STORIES[2][0]] and not stop
    train, stop, measured = split(config(source, model_folder, "run", eval_data=str(held_out)))
    assert len(train) == len(stop) == 1 and len(measured) == 2
    train, stop, measured = split(config(source, model_folder, "run"))
    assert len(train) == 3 and stop == measured
    with pytest.raises(ValueError, match="no response has a score that is left"):
        split(config(source, model_folder, "run", eval_data=str(source)))


def test_errors(model_folder, tmp_path):
    one = write_groups(tmp_path / "one.jsonl", STORIES[:1])
    with pytest.raises(ValueError, match="1 prompts have scores; wanted 2 or more"):
        reward(config(one, model_folder, tmp_path / "run"))
    with pytest.raises(ValueError, match="is no reward model: its classifier has 2 outputs"):
        RewardModel.load(model_folder, "float32", torch.device("cpu"))
    tied = write_groups(tmp_path / "tied.jsonl", [("P", [("a", 1), ("b", 1)]), ("Q", [("a", 2), ("b", 2)])])
    with pytest.raises(ValueError, match="two responses of unequal scores"):
        reward(config(tied, model_folder, tmp_path / "run", loss="bradley-terry"))
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_torn_checkpoint_is_passed_over(tmp_path):
    assert _last_checkpoint(tmp_path) is None
    for step, state in ((2, "{}"), (10, "{}"), (12, '{"epoch": ')):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(state)
    assert _last_checkpoint(tmp_path) == str(tmp_path / "checkpoints" / "checkpoint-10")
