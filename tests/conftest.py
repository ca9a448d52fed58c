"""Shared by the tests: tolerances, a tiny tokenizer and tiny models, real data where it lies beside the project."""

import json
import os
from pathlib import Path

import pytest
import torch

from ddpo import reference
from ddpo.ops import chunked, cpp
from ddpo.run import Stop

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("DDPO_SHARED_DATA", ROOT.parent / "shared" / "data"))
torch.use_deterministic_algorithms(True)  # with it torch.empty and at::empty arrive full of NaN


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also the cases that say over what others say in short")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: runs with --long alone (`make test-long`)")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="runs with --long"))


ULPS = {torch.float64: 64, torch.float32: 4, torch.bfloat16: 0.5, torch.float16: 0.5}


def close_to_truth(ours, same_dtype, truth, factor=2.0):
    """Our error against float64 may be at most `factor` times PyTorch's own in the same dtype, and a few units in the
    last place of the largest value (at least of 0.1). All tolerances of kernels live here."""
    assert torch.isfinite(ours).all()
    error = (ours.double() - truth).abs().max()
    base = (same_dtype.double() - truth).abs().max()
    floor = ULPS[ours.dtype] * torch.finfo(ours.dtype).eps * float(truth.abs().max().clamp(min=0.1))
    assert error <= factor * base + floor, f"error {error:.3e}, PyTorch's own {base:.3e}"


def relative(a, b):
    """Relative L2 distance of two tensors or two dicts of tensors."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = (torch.cat([x[k].double().reshape(-1) for k in sorted(x)]) for x in (a, b))
    return float((a.double() - b.double()).norm() / b.double().norm())


# --- linear_logp ------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
need_cpp = pytest.mark.skipif(not cpp.is_built and not os.environ.get("CI"), reason="ddpo._C was not built")
impls = pytest.mark.parametrize("impl", ["torch", pytest.param("cpp", marks=need_cpp)])


def case(N, D, V, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, head, bias = (torch.randn(*s, generator=g) for s in ((N, D), (V, D), (V,)))
    targets = torch.randint(0, V, (N,), generator=g)
    upstream = torch.randn(N, generator=g)  # not uniform: ones alone hid errors of peers
    return [x.to(dtype) for x in (hidden, head, bias)], targets, upstream


def gradients(f, tensors, targets, upstream, dtype, trained, **options):
    """logp and the gradients asked for: hidden's, and if trained head's and bias's."""
    hidden, head, bias = (x.to(dtype, copy=True) for x in tensors)
    inputs = [hidden.requires_grad_()]
    if trained:
        inputs += [head.requires_grad_(), bias.requires_grad_()]
    logp = f(hidden, head, targets, bias=bias, **options)
    return [logp.detach(), *torch.autograd.grad(logp, inputs, upstream.to(logp.dtype))]


def in_opmath(hidden, head, targets, bias, **options):
    """PyTorch on the same values with nothing rounded but the gradients: what half types are held to."""
    acc = chunked.opmath(hidden.dtype)
    return reference.linear_logp(hidden.to(acc), head.to(acc), targets, bias.to(acc), **options)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer(template=CHATML):
    """One token a byte, and two special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.chat_template = template
    return tokenizer


def tiny_model(family="starcoder2", seed=0, **changes):
    """A random causal model of two layers, float64, and as many tokens as the tiny tokenizer has.

    Starcoder2's norms are computed in the model's dtype. Llama's and others' are float32 whatever that is, which now
    and then turns a float64 rounding step into one of 1e-8.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 258,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 257,
    }
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**sizes, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64)


@pytest.fixture(scope="session", autouse=True)
def embeddings_folder(tmp_path_factory):
    """Embeddings are made anew in each session."""
    folder = tmp_path_factory.mktemp("embeddings")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddpo.embedded.default_folder", lambda: folder)
        yield


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """The tiny model and its tokenizer, saved."""
    folder = tmp_path_factory.mktemp("tiny-model")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


STORIES = [
    (
        "Write of a sea.",
        [("The sea was calm.", 3), ("No sea here, just sand!", 1), ("Waves; more waves...", 2), ("Tide", 5)],
    ),
    (
        "Write of a hill.",
        [("A hill rose up.", 2), ("Hills? I walked all day.", 4), ("Up, up and up.", 4), ("Grass.", 1)],
    ),
    ("Write of a bird.", [("It sang.", 1), ("The bird had a plan.", 2), ("Feathers fell on the roof", 3), ("Sky", 4)]),
    ("Write of a door.", [("It would not open.", 5), ("Knock knock.", 1), ("Oak, old, shut", 2), ("Who is it?", 3)]),
]


def write_groups(path, groups=STORIES):
    rows = ({"prompt": p, "responses": [{"text": t, "score": s} for t, s in r]} for p, r in groups)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def groups_file(tmp_path_factory):
    return write_groups(tmp_path_factory.mktemp("groups") / "groups.jsonl")


@pytest.fixture(scope="session")
def prepared_folder(tmp_path_factory, model_folder, groups_file):
    """The four small groups, paired by `all` and weighed by style (the semantic encoder would load for seconds)."""
    from ddpo.config import PrepareConfig
    from ddpo.prepare import prepare

    out = tmp_path_factory.mktemp("prepared") / "folder"
    prepare(
        PrepareConfig(
            source=str(groups_file), out=str(out), model=model_folder, pairs="all", gap=1.0, measures=("style",)
        )
    )
    return str(out)


@pytest.fixture
def make_prepared(tmp_path, model_folder, groups_file):
    """Prepares groups (default: the four small ones) into tmp_path/out, by default every pair, weighed by style."""
    from ddpo.config import PrepareConfig
    from ddpo.data.prepared import Prepared
    from ddpo.prepare import prepare

    def make(groups=None, **changes):
        source = write_groups(tmp_path / "source.jsonl", groups) if groups else groups_file
        usual = {"source": str(source), "model": model_folder, "pairs": "all", "gap": 1.0, "measures": ("style",)}
        return Prepared(prepare(PrepareConfig(**{**usual, "out": str(tmp_path / "out"), **changes})))

    return make


# --- runs ---------------------------------------------------------------------------------------------------

SMALL = {"dtype": "float64", "lr": 1e-3, "lora_r": 2, "lora_alpha": 4, "micro_tokens": 2000, "save_every": 0}


@pytest.fixture
def config(prepared_folder, model_folder, tmp_path):
    """(changes) -> settings of a short run over the four small groups, each with a run folder of its own."""
    count = iter(range(100))

    def make(**changes):
        from ddpo.config import TrainConfig

        fixed = {"data": prepared_folder, "model": model_folder, "out": str(tmp_path / f"run{next(count)}")}
        return TrainConfig(**{**fixed, **SMALL, **changes})

    return make


class StopAfter(Stop):
    """Asks to stop after some steps, as a signal would."""

    def __init__(self, num_steps):
        super().__init__()
        self._left = num_steps

    @property
    def requested(self):
        self._left -= 1
        return self._left < 0

    @requested.setter
    def requested(self, value):
        pass


def metrics(cfg):
    return [json.loads(line) for line in open(f"{cfg.out}/metrics.jsonl")]


def weights_of(cfg):
    from safetensors.torch import load_file

    kind = "adapter" if cfg.lora else "model"
    return load_file(next(p for p in (Path(cfg.out) / kind).glob("*.safetensors")))


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
