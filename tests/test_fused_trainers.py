"""The losses in other people's trainers: against Liger's and TRL's own code, under autocast, torch.compile and DDP."""

import importlib.util
import inspect
import os
import subprocess
import sys
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import close_to_truth, relative
from test_fused import B, D, V, batch, f64, logps, run
from torch import nn
from torch.utils.checkpoint import checkpoint

from ddpo import FusedLinearDDPOLoss, FusedLinearDORPOLoss, linear_preference


def need(package):
    missing = importlib.util.find_spec(package) is None and not os.environ.get("CI")
    return pytest.mark.skipif(missing, reason=f"{package} is not installed: pip install -e '.[dev]'")


# --- Liger and TRL ----------------------------------------------------------------------------------------

DPO_OPTIONS = [
    {},
    {"beta": 0.5, "average_log_prob": True},
    {"compute_nll_loss": True, "alpha": 0.3},
    {"use_ref_model": False},
    *({"loss_type": name} for name in ("hinge", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")),
    {"loss_type": "discopop", "discopop_tau": 0.2},
    {"loss_type": "robust", "label_smoothing": 0.1},
    {"loss_type": "exo_pair", "label_smoothing": 1e-3},
]


def agree(ours, theirs):
    """To float32 rounding, of sums in another order."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).norm() <= 2e-6 * b.norm().clamp(min=0.1), (a, b)


@need("liger_kernel")
@pytest.mark.parametrize("options", DPO_OPTIONS, ids=str)
def test_ddpo_is_ligers_dpo(options):
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    x = batch()
    given = x.ref if options.get("use_ref_model", True) else ()
    ours = run(FusedLinearDDPOLoss(**options, compiled=False, chunk_size=2), x, *given)
    agree(ours, run(LigerFusedLinearDPOLoss(**options, compiled=False), x, *given))


@need("liger_kernel")
@pytest.mark.parametrize("nll_target", [False, True], ids=["", "nll_target"])
@pytest.mark.parametrize("options", [{}, {"beta": 0.5}, {"compute_nll_loss": False}], ids=str)
def test_dorpo_is_ligers_orpo(options, nll_target):
    from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

    x = batch()
    if nll_target:  # equal to target, another token, the prompt's, and none where target has one
        x.nll_target[0, 5], x.nll_target[1, 3] = (x.target[0, 5] + 1) % V, -100
    given = (x.nll_target,) if nll_target else ()
    ours = run(FusedLinearDORPOLoss(**options, compiled=False, chunk_size=2), x, *given)
    agree(ours, run(LigerFusedLinearORPOLoss(**options, compiled=False), x, *given))


@need("liger_kernel")
def test_signatures_are_ligers():
    """Every argument of theirs, in their order, with their defaults; ours come after, by keyword alone."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss, LigerFusedLinearORPOLoss

    for ours, theirs in (
        (FusedLinearDDPOLoss, LigerFusedLinearDPOLoss),
        (FusedLinearDORPOLoss, LigerFusedLinearORPOLoss),
    ):
        for method in ("__init__", "forward"):
            a, b = (list(inspect.signature(getattr(c, method)).parameters.values()) for c in (ours, theirs))
            assert [(p.name, p.default) for p in a[: len(b)]] == [(p.name, p.default) for p in b]
            assert all(p.kind == p.KEYWORD_ONLY for p in a[len(b) :])


def trl_self(**more):
    """What TRL's loss methods read of their trainer."""
    gather = SimpleNamespace(gather=lambda t: t, gather_for_metrics=lambda t: t, device=torch.device("cpu"))
    fixed = {"accelerator": gather, "aux_loss_enabled": False, "model": SimpleNamespace(training=True)}
    return SimpleNamespace(**{**fixed, **more})


def dpo_self(loss_type, label_smoothing):
    return trl_self(
        **{"ld_alpha": None, "precompute_ref_logps": True, "f_divergence_type": "reverse_kl", "beta": 0.1},
        **{"loss_types": [loss_type], "loss_weights": [1.0], "label_smoothing": label_smoothing},
        **{"use_weighting": False, "_metrics": defaultdict(lambda: defaultdict(list))},
        **{"_total_train_tokens": 0, "_tp_size": 1, "args": SimpleNamespace(discopop_tau=0.05)},
    )


@need("trl")
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "nca_pair", "robust", "apo_down"])
def test_ddpo_is_trls_dpo(loss_type):
    from trl.trainer.dpo_trainer import DPOTrainer

    x = batch()
    smoothing = 0.1 if loss_type == "robust" else 0.0
    _, ref_logp, _ = logps(x, torch.float32)

    def trls(head, hidden, target, bias):
        def model(labels, **_):  # (2B, S+1): TRL shifts by itself
            token = F.log_softmax(hidden @ head.T + bias, -1).gather(2, labels[:, 1:, None].clamp(min=0))[..., 0]
            zero = torch.zeros_like(token)
            token = token.where(labels[:, 1:] != -100, 0.0)
            return SimpleNamespace(log_probs=token, entropy=zero, mean_logits=zero, is_top1=zero.bool())

        ids, mask = (F.pad(t, (1, 0)) for t in (x.tokens, x.mask.long()))
        chosen, rejected = ref_logp.chunk(2)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
        inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        return DPOTrainer._compute_loss(dpo_self(loss_type, smoothing), model, inputs, return_outputs=False), ()

    chosen, rejected = ref_logp.chunk(2)
    ours = FusedLinearDDPOLoss(loss_type=loss_type, label_smoothing=smoothing)
    ours = run(ours, x, ref_chosen_logps=chosen, ref_rejected_logps=rejected)
    agree([ours[0], *ours[-3:]], run(trls, x))


@need("trl")
def test_dorpo_is_trls_orpo():
    """TRL's NLL is a mean over the batch's tokens, the prompt's too."""
    from trl.experimental.orpo import ORPOTrainer

    x = batch()
    metrics = {}

    def trls(head, hidden, target, bias):
        def model(ids, **_):
            logits = hidden @ head.T + bias
            return SimpleNamespace(logits=F.pad(logits, (0, 0, 0, 1)))  # (2B, S+1, V)

        trainer = trl_self(beta=0.1, is_encoder_decoder=False, padding_value=0)
        for name in ("get_batch_logps", "concatenated_inputs"):
            setattr(trainer, name, getattr(ORPOTrainer, name))
        for name in ("odds_ratio_loss", "concatenated_forward"):
            setattr(trainer, name, getattr(ORPOTrainer, name).__get__(trainer))
        ids = F.pad(x.tokens, (1, 0))
        attended = F.pad(x.nll_target != -100, (1, 0), value=True).long()
        labels = F.pad(x.target, (1, 0), value=-100)
        data = {}
        for name, half in (("chosen", slice(B)), ("rejected", slice(B, None))):
            data |= {f"{name}_input_ids": ids[half], f"{name}_labels": labels[half]}
            data |= {f"{name}_attention_mask": attended[half]}
        loss, found = ORPOTrainer.get_batch_loss_metrics(trainer, model, data)
        metrics.update(found)
        return loss, ()

    theirs = run(trls, x)
    ours = run(FusedLinearDORPOLoss(), x, x.nll_target)
    agree([ours[0], *ours[-3:]], theirs)
    names = "logps/chosen logps/rejected logits/chosen logits/rejected nll_loss rewards/chosen rewards/rejected"
    for value, name in zip(ours[1:10], [*names.split(), "log_odds_ratio", "log_odds_chosen"], strict=True):
        assert value.mean().item() == pytest.approx(metrics[name], rel=1e-5, abs=1e-6), name


# --- autocast, torch.compile, processes -------------------------------------------------------------------


@pytest.mark.parametrize("module", [FusedLinearDDPOLoss(), FusedLinearDORPOLoss()])
def test_autocast(module):
    x = batch()
    args = x.ref if isinstance(module, FusedLinearDDPOLoss) else ()
    plain = run(module, x, *args)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(module, x, *args)
    for a, b in zip(cast, plain, strict=True):
        assert a.dtype == torch.float32
        close_to_truth(a, b.bfloat16(), b.double(), factor=20)
    assert torch.equal(torch.stack(cast[3:5]), torch.stack(plain[3:5])), "the logits' means were rounded"


class Trainer(nn.Module):
    """Body, head and loss in one module, as DDP and torch.compile want it."""

    def __init__(self, loss):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.lm_head, self.loss = nn.Linear(D, D), nn.Linear(D, V), loss

    def forward(self, hidden, target, **options):
        return self.loss(self.lm_head, self.body(hidden).tanh(), target, **options)[0]


def gradients(module, *args, **options):
    module.zero_grad()
    module(*args, **options).backward()
    return {name: p.grad.clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("loss", [FusedLinearDDPOLoss(), FusedLinearDORPOLoss()], ids=["ddpo", "dorpo"])
def test_compiles_without_a_graph_break(loss):
    x, module = batch(), Trainer(loss)
    options = {"weight": x.weight, "rows": x.rows}
    if isinstance(loss, FusedLinearDDPOLoss):
        options |= {"ref_chosen_logps": -torch.ones(B), "ref_rejected_logps": -torch.ones(B)}
    eager = gradients(module, x.input, x.target, **options)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    loss = compiled(x.input, x.target, **options)
    module.zero_grad()
    loss.backward()
    assert relative({name: p.grad for name, p in module.named_parameters()}, eager) < 1e-6


def test_inductor():
    x, module = batch(), Trainer(FusedLinearDDPOLoss(use_ref_model=False))
    torch._dynamo.reset()
    with torch.no_grad():  # half the compiling
        loss = torch.compile(module, fullgraph=True)(x.input, x.target, rows=x.rows)
        torch.testing.assert_close(loss, module(x.input, x.target, rows=x.rows))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize(
    "loss", [FusedLinearDDPOLoss(use_ref_model=False), FusedLinearDORPOLoss()], ids=["ddpo", "dorpo"]
)
def test_given_rows_need_no_host_sync(loss):
    x, module = batch(), Trainer(loss).cuda()
    args, options = (x.input.cuda(), x.target.cuda()), {"weight": x.weight.cuda(), "rows": x.rows.cuda()}
    found = gradients(module, *args, weight=options["weight"])
    try:
        torch.cuda.set_sync_debug_mode("error")
        module.zero_grad()
        module(*args, **options).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert relative({name: p.grad for name, p in module.named_parameters()}, found) < 1e-6


def test_ddp_reduces_every_gradient(tmp_path):
    """Two processes with three pairs each, head trained: the same gradient on both, and one process's over all six."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, __file__, str(tmp_path)], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = [gradients(*ddp_case(rank)) for rank in range(2)]
    whole = {name: (alone[0][name] + alone[1][name]) / 2 for name in alone[0]}
    assert relative(*alone) > 0.1, "the ranks' batches are alike"
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in whole)
    assert relative(ranks[0], whole) < 1e-12


def ddp_case(rank):
    x = batch(f64, seed=rank)
    return Trainer(FusedLinearDDPOLoss(use_ref_model=False)).double(), x.input, x.target


def ddp_process(folder):
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    module, *args = ddp_case(rank)
    found = gradients(nn.parallel.DistributedDataParallel(module), *args)
    torch.save({name.removeprefix("module."): g for name, g in found.items()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    ddp_process(sys.argv[1])


def test_inside_activation_checkpointing_and_with_a_loss_scale():
    """Saved tensors may be read only once; float16 gradients meet their loss scale in backward, not before."""
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(20, 8, generator=g), torch.randn(31, 8, generator=g)
    targets = torch.randint(0, 31, (20,), generator=g)
    segments, pairs = torch.tensor([0, 5, 9, 14, 20]), torch.tensor([[0, 1], [2, 3], [0, 3]])

    def loss(h, w, **options):
        return linear_preference(h, w, targets, segments, pairs, None, beta=0.1, **options)[0]

    grads = []
    for f in (loss, lambda h, w: checkpoint(loss, h, w, use_reentrant=False)):
        leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
        grads.append(torch.autograd.grad(f(*leaves), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    h, truth = hidden.half().requires_grad_(), hidden.half().double().requires_grad_()
    (loss(h, head.half(), denominator=65536) * 65536).backward()
    (loss(truth, head.half().double(), denominator=65536) * 65536).backward()
    assert relative(h.grad, truth.grad) < 2e-3
