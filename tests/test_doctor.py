"""`ddpo doctor`: what it says of this machine, and that it says it where parts are broken."""

import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import need_cpp

from ddpo import probes
from ddpo.cli import main
from ddpo.ops import cpp


def doctor(*arguments, **environment):
    command = [sys.executable, "-m", "ddpo", "doctor", *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)


def findings(capsys):
    main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    return found, {(f["section"], f["name"]): f for f in found["findings"]}


def test_of_this_machine(capsys):
    result, found = findings(capsys)
    assert result["sound"]
    assert found["torch", "torch"]["found"].startswith(torch.__version__)
    assert found["packages", "python"]["found"].startswith(platform.python_version())
    for op in ("linear_logp", "linear_preference", "packed_attention", "layers"):
        assert found["ops", f"{op}, CPU"]["found"].startswith(
            "cpp: " if cpp.is_built else ("torch: ", "the model's own")
        )
    assert "faiss" in found["ops", "mean_distance, euclidean"]["found"]
    assert float(found["machine", "free memory"]["found"].split()[0]) > 0
    assert all(f["way_out"] for f in result["findings"] if f["state"] != "ok")


def test_as_a_table(capsys):
    main(["doctor"])
    out = capsys.readouterr().out
    assert "linear_logp, CPU" in out and out.rstrip().endswith("what is required is there")


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(cpp, "is_built", False)
    found = {f.name: f for f in probes.kernels()}
    assert found["linear_logp, CPU"].found == "torch: ddpo._C was not built"
    assert found["linear_logp, CPU"].state == "note" and "DDPO_BUILD_CPP=1" in found["linear_logp, CPU"].way_out


def test_packages_under_their_floor(monkeypatch, capsys):
    """A required one that is too old or not there is broken, and the command ends with 1."""
    monkeypatch.setattr(probes.metadata, "requires", lambda name: ["numpy>=99", "nothing-here", "rich; extra == 'x'"])
    found = {f.name: f for f in probes.packages() if f.section == "packages"}
    assert found["numpy"].state == found["nothing-here"].state == "broken" and "rich" not in found
    assert found["numpy"].way_out == "pip install 'numpy>=99'"
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--json"])
    assert stopped.value.code == 1 and not json.loads(capsys.readouterr().out)["sound"]


def test_secrets_are_not_shown(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    main(["doctor", "--json"])
    out = capsys.readouterr().out
    assert '"HF_TOKEN", "found": "set"' in out and "hf_secret" not in out


def test_torch_that_cannot_be_imported(tmp_path):
    """A line, no traceback, exit code 1; the rest is told all the same."""
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = doctor("--json", PYTHONPATH=path)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    broken = [f for f in json.loads(done.stdout)["findings"] if f["state"] == "broken"]
    assert "libcudart.so.12" in next(f["found"] for f in broken if f["name"] == "torch")
    assert all(f["way_out"] for f in broken)


# --- an extension of another machine ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "unit, here, fits",
    [
        ("AVX512", "AVX2", False),
        ("AVX2", "DEFAULT", False),
        ("AVX2", "SVE256", False),
        ("AVX2", "AVX2", True),
        ("AVX2", "AVX512", True),
        ("DEFAULT", "DEFAULT", True),
        (None, "AVX2", True),
    ],
)
def test_unit_it_was_built_for(unit, here, fits, tmp_path):
    file = tmp_path / "_C.so"
    file.write_bytes(b"\x7fELF" + (f"ddpo._C built for {unit};".encode() if unit else b"") + b"\0")
    assert cpp.built_for(file) == unit
    if fits:
        cpp.check_unit(file, here)
    else:
        with pytest.raises(ImportError, match=f"was built for {unit}, this machine has {here}; build it anew"):
            cpp.check_unit(file, here)


@need_cpp
def test_it_is_refused_before_it_is_loaded():
    """On a machine that, as far as torch may know, has no such unit: one line, exit code 1."""
    file = importlib.util.find_spec("ddpo._C").origin
    unit = cpp.built_for(Path(file))
    assert unit == torch.backends.cpu.get_cpu_capability() or not os.environ.get("CI")  # there it is built anew
    if unit in (None, "DEFAULT"):
        pytest.skip("this build runs everywhere")
    env = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    code = (
        "from ddpo.config import DoctorConfig; from ddpo.settings import run_command\n"
        "run_command(lambda cfg: __import__('ddpo.ops'), DoctorConfig, 'ddpo', None, [])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 1 and re.fullmatch(
        f"error: .*was built for {unit}, .*DEFAULT; build it anew.*\n", done.stderr
    )


def test_doctor_tells_it(monkeypatch):
    why = "ImportError: ddpo/_C.so: was built for AVX512, this machine has AVX2; build it anew here"
    tried = probes.tried
    monkeypatch.setattr(probes, "tried", lambda name: (None, why) if name == "ddpo.ops.cpp" else tried(name))
    (found,) = probes.kernels()
    assert found.state == "broken" and found.found == why and found.way_out
