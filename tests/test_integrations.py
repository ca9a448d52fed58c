"""The losses in TRL's and transformers' trainers as installed, against TRL's own losses and the reference."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from datasets import Dataset, load_from_disk
from peft import LoraConfig
from test_fused_trainers import need

from ddpo import reference, weigh_dataset

pytestmark = need("trl")
ROWS = [
    ("Write of a sea.", "The sea was calm.", "No sea here", 1.7),
    ("Write of a hill.", "Hills? I walked all day.", "Grass.", 0.0),
    ("Write of a bird.", "Sky", "It sang.", 0.4),
    ("Write of a door.", "It would not open.", "Knock knock.", 1.9),
]
LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
METRICS = ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")


def data(weights=True):
    columns = ("prompt", "chosen", "rejected", "weight")
    rows = [dict(zip(columns, row, strict=True)) for row in ROWS]
    return Dataset.from_list([{k: v for k, v in row.items() if weights or k != "weight"} for row in rows])


def settings(cls, folder, **changes):
    usual = {"per_device_train_batch_size": 4, "max_steps": 1, "report_to": [], "save_strategy": "no", "bf16": False}
    fixed = {"use_cpu": True, "logging_steps": 1, "learning_rate": 1e-2, "seed": 0, "gradient_checkpointing": False}
    return cls(output_dir=str(folder), beta=0.3, **{**usual, **fixed, **changes})


def make(trainer, config, folder, rows, lora=True, peft=LORA, **changes):
    torch.manual_seed(0)
    model = tiny_model("llama", initializer_range=0.1).float()
    model.name_or_path = model.config._name_or_path = "tiny"
    more = {"peft_config": peft} if lora else {}
    return trainer(
        model=model,
        args=settings(config, folder, **changes),
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
        **more,
    )


def loss_and_gradient(trainer):
    """Of the first batch, in the data's order."""
    trainer.model.train()
    generator = torch.Generator().manual_seed(1)
    for p in trainer.model.parameters():  # away from the reference
        if p.requires_grad:
            p.data += 0.02 * torch.randn(p.shape, generator=generator)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(ROWS))])
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def same(a, b, tolerance=2e-5):
    assert a.keys() == b.keys() and len(a)
    for name in a:
        assert (a[name] - b[name]).norm() <= tolerance * b[name].norm() + 1e-7, name


def trl_trainers():
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    from ddpo.integrations.trl import DDPOTrainer, DORPOTrainer

    return {"dpo": (DDPOTrainer, DPOTrainer, DPOConfig), "orpo": (DORPOTrainer, ORPOTrainer, ORPOConfig)}


ALL_ONE = [(*row[:3], 1.0) for row in ROWS]


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "all weights"])
@pytest.mark.parametrize("method", ["dpo", "orpo"])
def test_weights_of_one_are_trls_own(tmp_path, method, lora):
    """Loss, gradient and every metric TRL logs."""
    ours, theirs, config = trl_trainers()[method]
    ref = {"precompute_ref_log_probs": True} if method == "dpo" and not lora else {}
    weighted = data().remove_columns("weight").add_column("weight", [1.0] * len(ROWS))
    a = make(ours, config, tmp_path, weighted, lora, **ref)
    b = make(theirs, config, tmp_path, data(weights=False), lora, **ref)
    (loss, gradient), (loss_b, gradient_b) = loss_and_gradient(a), loss_and_gradient(b)
    assert torch.allclose(loss, loss_b, rtol=1e-5)
    same(gradient, gradient_b)
    if method == "dpo":
        told, told_b = (x._metrics["train"] for x in (a, b))
        assert set(told) == {*told_b, "weight"}
    else:
        told, told_b = (x._stored_metrics["train"] for x in (a, b))
        assert set(told) == set(told_b)
    for name in told_b:
        assert told[name] == pytest.approx(told_b[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("method", ["dpo", "orpo"])
def test_weights_weigh(tmp_path, method):
    """The loss is the weighted mean of the pairs' own, and a pair of weight 0 moves nothing."""
    ours, _, config = trl_trainers()[method]
    trainer = make(ours, config, tmp_path, data())
    loss, _ = loss_and_gradient(trainer)
    collate = trainer.data_collator
    weights = torch.tensor([row[3] for row in ROWS])
    with torch.no_grad():
        alone = [
            trainer.compute_loss(trainer.model, collate([{**trainer.train_dataset[i], "weight": 1.0}]))
            for i in range(4)
        ]
    if method == "dpo":
        assert torch.allclose(loss, (weights * torch.stack(alone)).mean(), rtol=1e-5)
    else:  # the NLL's mean is over tokens: compare with FusedLinearDORPOLoss' own definition by one weight for all
        twice = [{**trainer.train_dataset[i], "weight": 2.0} for i in range(4)]
        once = [{**trainer.train_dataset[i], "weight": 1.0} for i in range(4)]
        with torch.no_grad():
            a, b = (trainer.compute_loss(trainer.model, collate(rows)) for rows in (twice, once))
        assert torch.allclose(a, 2 * b, rtol=1e-5)


def test_against_reference(tmp_path):
    """DDPO as float64 has it, from logits of the whole model."""
    ours, _, config = trl_trainers()["dpo"]
    trainer = make(ours, config, tmp_path, data())
    loss, _ = loss_and_gradient(trainer)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    logp = []
    for model in (trainer.model, None):
        with torch.no_grad():
            if model is None:
                with trainer.model.disable_adapter():
                    logits = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
            else:
                logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
        token = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
        logp.append((token * batch["completion_mask"][:, 1:]).sum(1))
    chosen, rejected = logp[0].chunk(2)
    wanted = reference.ddpo(chosen, rejected, *logp[1].chunk(2), batch["weight"].double(), 0.3).mean()
    assert torch.allclose(loss.double(), wanted, rtol=1e-5)


@pytest.mark.parametrize("method", ["dpo", "orpo"])
def test_trains_and_logs(tmp_path, method):
    """A few steps as a user takes them; evaluation without weights too."""
    ours, _, config = trl_trainers()[method]
    trainer = make(ours, config, tmp_path, data(), max_steps=3, per_device_train_batch_size=2)
    trainer.train()
    assert trainer.state.global_step == 3
    logged = {key for entry in trainer.state.log_history for key in entry}
    assert {"rewards/margins", "rewards/accuracies", "logps/chosen", "loss"} <= logged
    found = trainer.evaluate(data(weights=False)) if method == "dpo" else None
    assert found is None or found["eval_loss"] > 0


def train_each(folder, batch_size, methods=("dpo", "orpo")):
    """Two steps of each trainer on all rows: what it logged, and its adapter."""
    one = data().remove_columns("weight").add_column("weight", [1.0] * len(ROWS))
    found = {}
    for method in methods:
        ours, theirs, config = trl_trainers()[method]
        for name, cls, rows in (
            ("ours", ours, one),
            ("theirs", theirs, data(weights=False)),
            ("weighted", ours, data()),
        ):
            trainer = make(cls, config, folder, rows, max_steps=2, per_device_train_batch_size=batch_size)
            trainer.train()
            adapter = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
            found[method, name] = trainer.state.log_history[:2], adapter
    if trainer.is_world_process_zero():
        torch.save(found, f"{folder}/found.pt")
    return found


def test_two_processes(tmp_path):
    """Under DDP weights of 1 are TRL's own, others change both, and weighted DPO is that of one process with both
    batches (ORPO's is not, in TRL neither: its NLL is a mean over a process's tokens)."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, __file__, str(tmp_path)], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    two = torch.load(tmp_path / "found.pt", weights_only=True)
    for method in ("dpo", "orpo"):
        (logged, adapter), (logged_b, adapter_b) = two[method, "ours"], two[method, "theirs"]
        same(adapter, adapter_b, 1e-3)
        with pytest.raises(AssertionError):
            same(adapter, two[method, "weighted"][1], 1e-2)
        for step, step_b in zip(logged, logged_b, strict=True):
            assert {n: step[n] for n in METRICS} == pytest.approx({n: step_b[n] for n in METRICS}, rel=1e-4, abs=1e-6)
    one = train_each(tmp_path, 4, ["dpo"])
    (logged, adapter), (logged_b, adapter_b) = two["dpo", "weighted"], one["dpo", "weighted"]
    same(adapter, adapter_b, 1e-3)
    names = (*METRICS, "weight")
    for step, step_b in zip(logged, logged_b, strict=True):
        assert {n: step[n] for n in names} == pytest.approx({n: step_b[n] for n in names}, rel=1e-4, abs=1e-6)


def test_virtual_tokens(tmp_path):
    """Prompt learning puts tokens before the prompt's: training and evaluation are TRL's."""
    from peft import PromptTuningConfig

    ours, theirs, config = trl_trainers()["dpo"]
    peft = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    one = data().remove_columns("weight").add_column("weight", [1.0] * len(ROWS))
    losses = []
    for trainer, rows in ((ours, one), (theirs, data(weights=False))):
        trainer = make(trainer, config, tmp_path, rows, peft=peft)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(ROWS))])
        trainer.model.train()
        losses.append(trainer.compute_loss(trainer.model, batch).item())
        trainer.model.eval()
        with torch.no_grad():
            losses.append(trainer.compute_loss(trainer.model, batch).item())
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-5)


def test_refused(tmp_path):
    ours, _, config = trl_trainers()["dpo"]
    with pytest.raises(ValueError, match=r"must have a column 'weight'.*`ddpo weigh`"):
        make(ours, config, tmp_path, data(weights=False))
    with pytest.raises(ValueError, match=r"loss_type must be one of .*got \['aot'\]"):
        make(ours, config, tmp_path, data(), loss_type="aot")
    for bad in (-1.0, float("nan"), None):
        rows = data().remove_columns("weight").add_column("weight", [1.0, 1.0, bad, 1.0])
        with pytest.raises(ValueError, match=r"weight must be a finite number >= 0, got .* in row 2"):
            make(ours, config, tmp_path, rows)
    with pytest.raises(ValueError, match="ld_alpha must be None"):
        make(ours, config, tmp_path, data(), ld_alpha=0.5)


def test_weighed_set_trains_in_trl(tmp_path):
    """weigh_dataset, save_to_disk, load_from_disk; TRL's own trainer ignores the column, ours reads it."""
    ours, theirs, config = trl_trainers()["dpo"]
    weighed = weigh_dataset(data(weights=False), measures=("style",))
    weighed.save_to_disk(tmp_path / "weighed")
    rows = load_from_disk(tmp_path / "weighed")
    assert rows.column_names == ["prompt", "chosen", "rejected", "weight"]
    for trainer in (theirs, ours):
        make(trainer, config, tmp_path / trainer.__name__, rows).train()


if __name__ == "__main__":  # of test_two_processes
    train_each(sys.argv[1], 2)
