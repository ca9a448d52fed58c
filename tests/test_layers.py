"""The floors, the homes of heavy imports and the size limit of CONTRIBUTING.md."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

FLOORS = [  # a file imports its own floor or lower
    {"kernels"},
    {"reference", "files", "interrupts", "mishaps", "_C"},
    {"ops"},
    {"losses", "fused", "deviation", "metrics", "text_measures"},
    {
        *("data", "encoders", "loading", "attention", "layers", "model", "refcache", "checkpoint", "log", "config"),
        *(
            "distributed",
            "objective",
            "own_loss",
            "schedule",
            "passes",
            "run",
            "state",
            "watch",
            "settings",
            "footprint",
            "embedded",
            "ledger",
            "reward_model",
            "weighing",
            "items",
            "likelihood",
            "measuring",
        ),
    },
    {
        *("train", "generate", "evaluate", "annotate", "winrate", "prepare", "weigh", "tune", "plan"),
        *("reward", "score", "dryrun", "report", "export", "doctor", "probes"),
    },
    {"demo", "cli", "__main__", "integrations"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
HOMES = {
    "triton": ("kernels/",),
    "transformers": (
        *("ddpo/loading", "ddpo/attention", "ddpo/layers"),
        *("ddpo/encoders", "ddpo/data/tokens", "ddpo/generate", "ddpo/reward"),
    ),
}


def files(*folders, ending="*.py"):
    return sorted(p.relative_to(ROOT).as_posix() for folder in folders for p in (ROOT / folder).rglob(ending))


FILES = files("ddpo", "kernels")
SOURCES = [*FILES, *files("tests", "benchmarks"), *files("csrc", ending="*.cpp")]


def imports(path):
    """Every module or name imported anywhere in the file, `from a import b` as a.b."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(path):
    return path.removeprefix("ddpo/").removesuffix(".py").split("/")[0]


@pytest.mark.parametrize("path", [f for f in FILES if f != "ddpo/__init__.py"])
def test_floors_and_homes(path):
    floor = FLOOR[module_of(path)]
    for name in imports(path):
        parts = name.split(".")
        assert parts[0] not in ("tests", "benchmarks"), f"{path} imports {name}"
        if parts[0] == "ddpo" and parts[1] != "__version__":
            assert FLOOR[parts[1]] <= floor, f"{path} (floor {floor}) may not import {name}"
        for package, homes in HOMES.items():
            assert parts[0] != package or path.startswith(homes), f"{package} belongs in {homes}, not in {path}"


def test_no_circles():
    graph = {}
    for path in FILES:
        used = {n.split(".")[1] for n in imports(path) if n.startswith("ddpo.")}
        graph.setdefault(module_of(path), set()).update(used & FLOOR.keys() - {module_of(path)})

    def walk(module, trail):
        assert module not in trail, " -> ".join([*trail, module])
        for used in graph.get(module, ()):
            walk(used, [*trail, module])

    for module in graph:
        walk(module, [])


@pytest.mark.parametrize("path", SOURCES)
def test_no_file_is_long(path):
    assert (ROOT / path).read_text().count("\n") < 400, "split it"


def test_import_is_light():
    code = "import sys, ddpo, ddpo.config; print([m for m in ('torch', 'triton', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_public_names_resolve():
    import ddpo

    for name in ddpo.__all__:
        assert getattr(ddpo, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'dppo'"):
        _ = ddpo.dppo


def test_kernels_is_no_package():
    """A regular package called kernels in the working folder would shadow Hugging Face's."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("path", [p.name for p in ROOT.glob("*.md")] + ["benchmarks/LOG.md"])
def test_named_paths_exist(path):
    """Files that the documents name exist."""
    for name in re.findall(r"`((?:ddpo|tests|csrc|kernels|benchmarks)/[\w/.]+)`", (ROOT / path).read_text()):
        assert (ROOT / name).exists(), f"{path} names {name}"
