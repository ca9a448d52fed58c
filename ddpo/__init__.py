"""ddpo: preference training that keeps language models diverse (DDPO and DORPO, arXiv 2503.17126).

The public names below are imported on first use: `import ddpo` loads neither torch nor triton.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "linear_logp": "ddpo.ops",
    "linear_preference": "ddpo.ops",
    "packed_attention": "ddpo.ops",
    "sequence_sum": "ddpo.ops",
    "dpo": "ddpo.losses",
    "ddpo": "ddpo.losses",
    "orpo": "ddpo.losses",
    "dorpo": "ddpo.losses",
    "spl": "ddpo.losses",
    "ipo": "ddpo.losses",
    "simpo": "ddpo.losses",
    "gvpo": "ddpo.losses",
    "sft": "ddpo.losses",
    "FusedLinearDDPOLoss": "ddpo.fused",
    "FusedLinearDORPOLoss": "ddpo.fused",
    "sequence_logp": "ddpo.fused",
    "preference_loss": "ddpo.fused",
    "head_of": "ddpo.fused",
    "mean_distance": "ddpo.deviation",
    "nearest_distance": "ddpo.deviation",
    "vendi_score": "ddpo.deviation",
    "log_det": "ddpo.deviation",
    "distinct_k": "ddpo.deviation",
    "weights": "ddpo.deviation",
    "weigh_dataset": "ddpo.weigh",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ddpo' has no attribute {name!r}")
