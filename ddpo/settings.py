"""Settings read from YAML and the command line, and written back. Loads neither torch nor transformers."""

import difflib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_origin, get_type_hints

import yaml

from ddpo.interrupts import catching
from ddpo.mishaps import explain

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
INTERRUPTED = 130


def parse(cls: type[Config], argv: list[str], prog: str, positional: str | None = None) -> Config:
    """Settings of a command from `--config FILE.yaml` and command-line options, the latter first.

    positional: field that the first bare argument names; all that come first, where the field is a tuple. Unknown keys
    and options raise ValueError with the nearest name.
    """
    import tyro

    names = [f.name for f in fields(cls)]
    argv = list(argv)
    several = positional and get_origin(get_type_hints(cls)[positional]) is tuple
    num_bare = next((i for i, a in enumerate(argv) if a.startswith("-")), len(argv))
    if positional and num_bare:
        argv[:0] = [f"--{positional}"]  # tyro says what it does not know: a second one where there is but one
    from_file: list[str] = []
    argv = [part for a in argv for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    if "--config" in argv:
        at = argv.index("--config")
        path = argv[at + 1] if at + 1 < len(argv) else ""
        del argv[at : at + 2]
        from_file = _options(path, names)
    for option in argv:
        if option.startswith("--") and option != "--help":
            _check_name(option[2:].split("=")[0], names, "option")
    arguments = "The first bare arguments are" if several else "The first bare argument is"
    bare = f"{arguments} --{positional}. " if positional else ""
    description = f"{inspect.getdoc(cls)}\n\n{bare}Options can stand in a YAML file too: --config FILE."
    return tyro.cli(cls, args=from_file + argv, prog=prog, description=description)


def _options(path: str, names: list[str]) -> list[str]:
    """The entries of a YAML file as command-line options, so that one parser checks both."""
    if not Path(path).is_file():
        raise ValueError(f"config: there is no file {path}")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as err:
        raise ValueError(f"config: {path} is not YAML: {err}") from None
    if not isinstance(values, dict):
        raise ValueError(f"config: {path} must hold 'key: value' lines, got {type(values).__name__}")
    options = []
    for key, value in values.items():
        _check_name(str(key), names, "key")
        if isinstance(value, bool):
            options.append(f"--{key}" if value else f"--no-{key}")
        elif isinstance(value, list):
            options += [f"--{key}", *map(str, value)]
        else:
            options += [f"--{key}", str(value)]
    return options


def _check_name(name: str, names: list[str], kind: str) -> None:
    plain = name.replace("-", "_")
    if plain in names or plain.removeprefix("no_") in names:
        return
    near = difflib.get_close_matches(plain, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
    raise ValueError(f"config: unknown {kind} {name!r}; {hint}")


def to_yaml(cfg) -> str:
    values = {f.name: getattr(cfg, f.name) for f in fields(cfg)}
    return yaml.safe_dump({k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}, sort_keys=False)


def run_command(
    run: Callable, cls: "type[DataclassInstance]", prog: str, positional: str | None, argv: list[str]
) -> None:
    """Parses and runs. What goes wrong is one line on stderr and an exit code: see ddpo.cli.EXIT_CODES."""
    from ddpo import log

    with catching() as asked:
        try:
            cfg = parse(cls, argv, prog, positional)
            with log.quiet(getattr(cfg, "json", False)):
                run(cfg)
        except BaseException as err:
            if isinstance(err, SystemExit) and not asked.yes:
                raise
            if isinstance(err, BrokenPipeError):  # the reader of our output has enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(1)
            code, line = (INTERRUPTED, _how_to_go_on(cls)) if asked.yes else explain(err)
            if os.environ.get("DDPO_TRACEBACK") and not asked.yes:
                raise
            rank = os.environ.get("RANK", "0")
            line = log.visible(" ".join(line.split()))
            print(line if rank == "0" else f"rank {rank}: {line}", file=sys.stderr)
            sys.exit(code)
        finally:
            if "ddpo.distributed" in sys.modules:  # the command was one of several processes, perhaps
                sys.modules["ddpo.distributed"].finish()


def _how_to_go_on(cls: type) -> str:
    again = "go on with the same command and --resume" if "resume" in {f.name for f in fields(cls)} else None
    return f"interrupted; {again or 'what was not finished was not written; give the command again'}"
