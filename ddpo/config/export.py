"""Settings of `ddpo export`."""

from dataclasses import dataclass

from ddpo.config.checked import Checked


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Checked):
    """Writes a run's model for others to load: an adapter, or with --merge a plain model, with a model card.

    The adapter is peft's; a merged model is a folder that transformers, vLLM and others load without peft or ddpo. The
    card (README.md) says method, data, settings, numbers and versions.

    Example: ddpo export runs/demo/run --merge --out merged
    """

    run: str
    """Run folder that is finished (adapter/ or model/ in it)."""
    out: str
    """Folder to make."""
    merge: bool = False
    """Put the adapter into the weights."""
    dtype: str = "auto"
    """Type of a merged model's weights: auto (the base model's), float32, bfloat16 or float16. The sum is made in
    float32 and rounded once."""
    evaluation: str | None = None
    """JSON of `ddpo evaluate --out`, whose numbers go into the card."""
    overwrite: bool = False
    """Replace an existing folder."""
    json: bool = False
    """Print what was written as JSON instead of a line."""
