"""The policy: a causal language model whose forward goes from a packed batch to sequence log-probs."""

import hashlib
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from ddpo.attention import windows_seen  # its module registers ddpo_packed
from ddpo.data.batches import Pack, pack
from ddpo.ops import cpp, linear_logp, sequence_sum

DROP_BELOW = 2.0**-16  # costs no more than 2^-14, whose error is under bfloat16 arithmetic's already: benchmarks/LOG.md


def pick_drop_below(value: float | None, device: torch.device, dtype: torch.dtype) -> float:
    """The setting of linear_logp for training. Raises ValueError for one that cannot be had."""
    possible = device.type == "cpu" and cpp.is_built
    if value is None:
        return DROP_BELOW if possible and dtype != torch.float64 else 0.0
    if not 0 <= value < 1 or (value and not possible):
        raise ValueError(f"drop_below must be in [0, 1), and 0 on GPUs and without the C++ kernels, got {value}")
    return value


class Policy(nn.Module):
    """A causal language model, with or without a LoRA adapter, from packed batch to log-probs.

    Body and head run inside one forward, so that a wrapper around the module sees every trained weight.
    """

    def __init__(self, model, drop_below: float = 0.0, autocast: torch.dtype | None = None, check_packing: bool = True):
        """drop_below: see linear_logp. autocast: dtype of the matrix products, None: the weights'. Raises ValueError
        for a model whose head is not a plain linear layer, or that cannot be packed, which check_packing tries."""
        super().__init__()
        self.model = model
        self.drop_below = drop_below
        self.autocast = autocast
        if type(self.causal.get_output_embeddings()) is not nn.Linear:
            raise ValueError(
                f"the head of the model is {type(self.causal.get_output_embeddings()).__name__}; wanted a plain "
                "linear layer: take lm_head out of lora_targets"
            )
        if check_packing:
            self._check_packing()
        else:
            self.causal.set_attn_implementation("ddpo_packed")

    @property
    def causal(self):
        """The transformers model, adapter layers inside it."""
        return self.model.get_base_model() if self.has_adapter else self.model

    @torch.no_grad()
    def _check_packing(self) -> None:
        """Two short sequences, packed, must get the log-probs that the model gives each alone with its own attention:
        layers that carry a state along (Mamba, convolutions) would leak it from one sequence into the next."""
        device = self.causal.get_output_embeddings().weight.device
        ids = [np.arange(3, 3 + n) % self.causal.config.vocab_size for n in (5, 7)]
        alone = torch.zeros(2, dtype=torch.float64, device=device)
        if getattr(self.causal.config, "attn_logit_softcapping", None):
            self.causal.set_attn_implementation("eager")  # of transformers' own, the one that caps
        for i, sequence in enumerate(ids):
            tokens = torch.from_numpy(sequence).to(device)
            with self._precision(device):
                logits = self.causal(tokens[None], use_cache=False).logits[0]
            logp = logits.double().log_softmax(-1)
            alone[i] = logp[:-1].gather(1, tokens[1:, None]).sum()
        self.causal.set_attn_implementation("ddpo_packed")
        source = SimpleNamespace(prompt_ids=lambda r: ids[r][:1], response_ids=lambda r: ids[r][1:])
        with windows_seen() as windows:
            packed = self(pack(source, range(2)).to(device))[0].double()
        config = self.causal.config.get_text_config()
        by_mask = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        if getattr(config, "attention_chunk_size", None) or (by_mask and windows == {None}):
            raise ValueError(
                f"{type(self.causal).__name__} narrows its attention by a mask alone, which packed sequences have not: "
                "not supported"
            )
        error = float(((packed - alone) / alone).abs().max())
        exact = self.causal.dtype in (torch.float32, torch.float64) and self.autocast is None
        if not error < (1e-4 if exact else 3e-2):
            raise ValueError(
                f"{type(self.causal).__name__} gives other log-probs packed than alone (relative error {error:.1e}): "
                "its layers see across sequences, or its logits are scaled in a way that is not known; not supported"
            )

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.model, "peft_config")

    def layers(self) -> list[nn.Module]:
        """The blocks of the body, each with its attention and its feed-forward part."""
        names = set(self.causal._no_split_modules or ())
        return [module for module in self.causal.modules() if type(module).__name__ in names]

    def forward(self, pack: Pack) -> Tensor:
        """(k, S) summed log-probs of the pack's responses, nats; a second row of their prompts if it scores them."""
        head, config = self.causal.get_output_embeddings(), self.causal.config
        with self._precision(pack.input_ids.device):
            logp = linear_logp(
                self.hidden(pack)[pack.rows],  # (N, D)
                head.weight,
                pack.targets,
                bias=head.bias,
                scale=logit_scale(config),
                softcap=getattr(config, "final_logit_softcapping", None),
                segments=pack.segments,
                drop_below=self.drop_below,
            )  # (N,)
        return sequence_sum(logp, pack.segments).view(-1, len(pack.cu_seqlens) - 1)

    def hidden(self, pack: Pack) -> Tensor:
        """(T, D) what the body gives the head, at every packed token."""
        body = self.causal.get_decoder()
        lengths = {"cu_seqlens": pack.cu_seqlens, "max_length_q": pack.max_seqlen, "max_length_k": pack.max_seqlen}
        return body(
            input_ids=pack.input_ids[None],
            position_ids=pack.position_ids[None],
            use_cache=False,
            cu_seq_lens_q=pack.cu_seqlens_device,
            cu_seq_lens_k=pack.cu_seqlens_device,
            **lengths,
        ).last_hidden_state[0]

    def _precision(self, device: torch.device):
        return torch.autocast(device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None)

    @contextmanager
    def reference(self):
        """Inside, the policy is the reference: the adapter off. A policy without one must not have been trained yet."""
        was_training = self.training
        self.eval()
        try:
            if self.has_adapter:
                with self.model.disable_adapter():
                    yield
            else:
                yield
        finally:
            self.train(was_training)

    def base_fingerprint(self) -> str:
        """Hash of the weights without the adapter."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.causal.state_dict().items()):
            if "lora_" not in name:
                digest.update(f"{name.replace('.base_layer', '')} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def logit_scale(config) -> float:
    """Cohere multiplies its logits by logit_scale, Granite divides them by logits_scaling."""
    return float(getattr(config, "logit_scale", 1.0) or 1.0) / float(getattr(config, "logits_scaling", 1.0) or 1.0)
