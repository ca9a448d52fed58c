"""A loss of the user's own: `--method FILE.py:NAME`, a function of sequence log-probs.

Its parameters say what it wants, in any order: `logp`, `pairs`, `ref_logp`, `num_tokens`, `beta` (see INPUTS). One that
takes `ref_logp` has a reference policy; others than these need a default, which they keep.
"""

import hashlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from torch import Tensor

INPUTS = {
    "logp": "(S,) nats, of each response under the policy",
    "pairs": "(P, 2) int64, rows of logp: chosen, rejected",
    "ref_logp": "(S,) nats, of each response under the reference policy",
    "num_tokens": "(S,) tokens of each response",
    "beta": "--beta; its default here is the function's own",
}


@dataclass(frozen=True)
class OwnLoss:
    """function: of `names` among INPUTS, to one value a pair (P,); called by name."""

    where: str  # FILE.py:NAME, for errors
    function: Callable[..., Tensor]
    names: tuple[str, ...]
    beta: float  # where --beta is not given

    def __call__(self, num_pairs: int, **inputs) -> Tensor:
        values = self.function(**{name: inputs[name] for name in self.names})
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        if shape != (num_pairs,):
            raise ValueError(
                f"{self.where}: must return a loss a pair, a tensor of shape (P,) = ({num_pairs},), got {shape}; "
                "leave the mean over the pairs, and their weights, to the trainer"
            )
        return values


@lru_cache
def own_loss(method: str, sha256: str) -> OwnLoss:
    """The function NAME of FILE.py, which is run as a module.

    Args:
        method: FILE.py:NAME.
        sha256: of the file, as it was when the settings were read.
    Returns: OwnLoss.
    Raises: ValueError for a file that changed since or does not run, for a name that is no function in it, and for a
        function without `logp` and `pairs` or with a parameter that nothing is known to give to.
    """
    file, _, name = method.rpartition(":")
    code = Path(file).read_bytes()
    if hashlib.sha256(code).hexdigest() != sha256:
        raise ValueError(f"{file} was changed while the command ran; start it again")
    module = ModuleType(f"ddpo_own_{Path(file).stem}")
    module.__file__ = file
    sys.modules[module.__name__] = module  # where dataclasses and torch.compile look for it
    try:
        exec(compile(code, file, "exec"), vars(module))  # what the user named to be run
    except Exception as err:
        raise ValueError(f"{file}: does not run as Python: {type(err).__name__}: {err}") from err
    function = getattr(module, name, None)
    if not inspect.isfunction(function):
        functions = ", ".join(n for n, value in vars(module).items() if inspect.isfunction(value)) or "none"
        raise ValueError(f"{file}: has no function {name!r}; functions there: {functions}")
    return _checked(method, function)


def _checked(method: str, function: Callable) -> OwnLoss:
    parameters = inspect.signature(function).parameters
    empty, by_name = inspect.Parameter.empty, (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [n for n, p in parameters.items() if n not in INPUTS and (p.default is empty or p.kind not in by_name)]
    known = "; ".join(f"{n}: {what}" for n, what in INPUTS.items())
    if needed:
        raise ValueError(f"{method}: nothing is given to parameter {needed[0]!r}; give it a default. Known: {known}")
    missing = [n for n in ("logp", "pairs") if n not in parameters]
    if missing:
        raise ValueError(
            f"{method}: wanted a function of logp and pairs, got one without {missing[0]!r}; known: {known}"
        )
    names = tuple(n for n in parameters if n in INPUTS)
    if any(parameters[n].kind not in by_name for n in names):
        raise ValueError(f"{method}: parameters are given by name; write them without '/' and '*'")
    beta = parameters["beta"].default if "beta" in parameters else empty
    beta = 0.1 if beta is empty else beta
    if not isinstance(beta, int | float):
        raise ValueError(f"{method}: the default of 'beta' must be a number, got {beta!r}")
    return OwnLoss(method, function, names, float(beta))
