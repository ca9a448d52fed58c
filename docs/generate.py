"""Writes docs/config.md from the dataclasses of every verb.

python docs/generate.py
"""

import ast
import inspect
import textwrap
import types
from dataclasses import MISSING, fields
from itertools import pairwise
from pathlib import Path
from typing import Literal, Union, get_args, get_origin, get_type_hints

from ddpo.cli import VERBS

CONFIG = Path(__file__).with_name("config.md")
INTRO = """# Every option of every verb

Made by `python docs/generate.py` from the dataclasses in `ddpo/config/`; `ddpo VERB --help` says the same.

An option `lora_r` is `--lora-r 32` on the command line and `lora_r: 32` in a YAML file given with `--config FILE`; the
command line comes first. Flags are `--resume` and `--no-resume`, lists `--lora-targets q_proj v_proj`. The first bare
argument (several, where it is a list) is the option named above each table. A key that is not known, or a value of the
wrong type, ends the command with exit code 2 and the nearest right name.

Exit codes: 0, done; 1, the machine failed or a check found something wrong; 2, wrong input; 130, interrupted.
"""


def config_page() -> str:
    """The text of docs/config.md."""
    configs = {cls: verb for verb, (_, cls, _) in VERBS.items()}
    return "\n".join([INTRO, *(_section(verb, cls, bare, configs) for verb, (_, cls, bare) in VERBS.items())])


def _section(verb: str, cls: type, bare: str | None, configs: dict[type, str]) -> str:
    about, _, example = inspect.getdoc(cls).partition("Example: ")
    parent = next((base for base in cls.__mro__[1:] if base in configs), None)  # another verb's settings, taken over
    shared = {f.name: f.default for f in fields(parent)} if parent else {}
    own = inspect.get_annotations(cls)
    shown = [f for f in fields(cls) if f.name not in shared or f.name in own]
    lines = [f"## ddpo {verb}", about.strip(), f"```sh\n{' '.join(example.split())}\n```"]
    if bare:
        lines.append(f"Bare arguments: `{bare}`.")
    if parent:
        lines.append(f"Takes all of [ddpo {configs[parent]}](#ddpo-{configs[parent]}), and:")
    texts, hints = _texts(cls), get_type_hints(cls)
    rows = [f"| `{f.name}` | {_type(hints[f.name])} | {_default(f)} | {texts[f.name]} |" for f in shown]
    lines.append("\n".join(["| key | type | default | |", "| --- | --- | --- | --- |", *rows]))
    return "\n\n".join(lines) + "\n"


def _texts(cls: type) -> dict[str, str]:
    """Field -> the docstring under it, of the class and of what it is made from."""
    found = {}
    for base in reversed(cls.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for field, text in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[field.target.id] = " ".join(text.value.value.split()).replace("|", "\\|")
    return found


def _type(hint) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(hint))
    if get_origin(hint) is tuple:
        return f"list of {_type(get_args(hint)[0])}"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_type(arg) for arg in get_args(hint) if arg is not type(None))
    return {str: "text", bool: "flag", int: "whole number", float: "number"}[hint]


def _default(field) -> str:
    if field.default is MISSING:
        return "needed"
    if field.default is None or field.default == ():
        return ""
    if isinstance(field.default, bool):
        return "yes" if field.default else "no"
    values = field.default if isinstance(field.default, tuple) else (field.default,)
    return " ".join(f"`{value}`" for value in values)


if __name__ == "__main__":
    CONFIG.write_text(config_page(), encoding="utf-8")
