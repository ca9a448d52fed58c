"""Attention within each sequence of a packed batch, registered with transformers as "ddpo_packed"."""

import itertools

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface


def packed_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, softcap=None, **kwargs
):
    """Causal attention within each sequence of a packed batch: query (1, H, T, d) -> (1, T, H, d).

    The sequences' lengths come as `cu_seq_lens_q`, a list of row offsets (S+1,). No (T, T) mask is made; a sequence
    longer than a sliding window gets one of its own length.
    """
    if softcap is not None or kwargs.get("s_aux") is not None:
        raise ValueError("models with a softcap (Gemma 2) or sinks (gpt-oss) in attention are not supported")
    offsets = kwargs["cu_seq_lens_q"]
    out = []
    for a, b in itertools.pairwise(offsets):
        q, k, v = query[:, :, a:b], key[:, :, a:b], value[:, :, a:b]
        mask = _window_mask(b - a, sliding_window, q.device)
        out.append(
            F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
        )
    return torch.cat(out, 2).transpose(1, 2), None


def _window_mask(length, window, device):
    if window is None or length <= window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None]
    return (distance >= 0) & (distance < window)


AttentionInterface.register("ddpo_packed", packed_attention)
AttentionMaskInterface.register("ddpo_packed", lambda *args, **kwargs: None)  # packed_attention masks by itself
