"""Which way impl 'triton' of linear_logp takes on a GPU: what `ddpo tune` found fastest there, else the default."""

import functools
import json
from pathlib import Path
from typing import NamedTuple

from ddpo.files import cache_folder


class Choice(NamedTuple):
    path: str = "chunked"  # or 'fused'
    chunk_mib: int = 256  # of logits; the fused path has none


def file() -> Path:
    """Where `ddpo tune` keeps its choices."""
    return cache_folder() / "tuned.json"


def key(dtype, D: int, V: int, head_trained: bool) -> str:
    return f"{dtype} D={D} V={V} head={'trained' if head_trained else 'frozen'}"


def choice(gpu: str, dtype, D: int, V: int, head_trained: bool) -> Choice:
    """The stored choice for this GPU (by name), type and head, or the default."""
    try:
        return Choice(**stored().get(gpu, {}).get(key(dtype, D, V, head_trained), {}))
    except (AttributeError, TypeError) as err:
        raise ValueError(f"{file()} holds something else ({err}); delete it and run `ddpo tune` again") from None


@functools.cache
def stored() -> dict:
    """{GPU: {key: choice}}; read once a process, so that a backward takes the path of its forward."""
    try:
        return json.loads(file().read_text())
    except FileNotFoundError:
        return {}
    except ValueError as err:
        raise ValueError(f"{file()} is not JSON ({err}); delete it and run `ddpo tune` again") from None
