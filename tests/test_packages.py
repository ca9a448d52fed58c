"""What an installed copy holds: metadata, typed public names, a quick import, complete distributions."""

import ast
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

import ddpo

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_stub_names_are_the_lazy_ones():
    """Type checkers read __init__.pyi: the same names from the same modules."""
    imports = [node for node in ast.parse((ROOT / "ddpo/__init__.pyi").read_text()).body if hasattr(node, "module")]
    assert {a.asname: node.module for node in imports for a in node.names} == ddpo._HOMES


def test_import_is_quick_and_light():
    """Under 50 ms, the best of five; neither torch nor triton is loaded."""
    code = """
import sys, time
start = time.perf_counter()
import ddpo
print(time.perf_counter() - start)
assert not {"torch", "triton"} & set(sys.modules)
"""
    done = [
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
        for _ in range(5)
    ]
    assert all(run.returncode == 0 for run in done), done[0].stderr
    assert min(float(run.stdout) for run in done) < 0.05


def test_what_is_imported_is_required():
    """Every package that the code imports is named in the metadata, in an extra where it is optional."""
    extras = PROJECT["project"]["optional-dependencies"]
    required = [*PROJECT["project"]["dependencies"], *extras["gpu"], *extras["trl"], *extras["report"]]
    named = {Requirement(r).name for r in required} | {"ddpo"}
    imported = set()
    for path in [*(ROOT / "ddpo").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {a.name.partition(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
    other_names = {"faiss": "faiss-cpu", "yaml": "pyyaml"}
    wanted = {other_names.get(m, m.replace("_", "-")) for m in imported - sys.stdlib_module_names - {"_typeshed"}}
    assert len(wanted) > 15 and wanted <= named, wanted - named


def test_extras():
    assert {"gpu", "trl", "report", "dev", "bench", "demo"} <= set(PROJECT["project"]["optional-dependencies"])


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(names in the sdist, wheel), the wheel built from the sdist without the C++ extension."""
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)],
        env={**os.environ, "DDPO_BUILD_CPP": "0"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(next(out.glob("*.tar.gz"))) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    return names, zipfile.ZipFile(next(out.glob("*.whl")))


def test_distributions_are_complete(built):
    """All that git tracks of the package, the kernels, the C++ source and the recipes."""
    sdist, wheel = built
    tracked = subprocess.run(
        ["git", "ls-files", "csrc", "kernels", "recipes", "ddpo"], cwd=ROOT, capture_output=True, text=True, timeout=60
    ).stdout.split()
    if not tracked:
        pytest.skip("no git checkout")
    package = {f for f in tracked if f.startswith("ddpo/")} - {"ddpo/kernels"}
    kernels = {f for f in tracked if f.startswith("kernels/") and f.endswith(".py")}
    assert set(tracked) - {"ddpo/kernels"} <= sdist
    assert package | {f"ddpo/{f}" for f in kernels} <= set(wheel.namelist())


def test_metadata(built):
    wheel = built[1]
    names = {name.rpartition("/")[2]: name for name in wheel.namelist() if ".dist-info/" in name}
    metadata = wheel.read(names["METADATA"]).decode()
    assert f"Version: {ddpo.__version__}" in metadata and "Requires-Dist: jinja2>=3.1.6" in metadata
    assert "ddpo = ddpo.cli:main" in wheel.read(names["entry_points.txt"]).decode()
