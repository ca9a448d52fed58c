#!/usr/bin/env bash
# Builds sdist and wheel, installs each into an empty environment with and without a compiler, and runs ddpo there.
#   tests/installed.sh            # about five minutes; `make packages`
# Torch and what else ddpo needs come from .venv, so that nothing is downloaded.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=$root/.venv/bin/python
site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')

fresh() { # NAME: a copy of the environment without ddpo in it
  "$python" -m venv --without-pip "$work/$1"
  local here
  here=$("$work/$1/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  for package in "$site"/*; do
    case $(basename "$package") in *ddpo*) ;; *) ln -s "$package" "$here/" ;; esac
  done
}

try() ( # NAME WANTED: `ddpo` of this environment runs, and ddpo._C is there or not, as wanted; in a shell of its own
  set -e
  cd "$work"
  "$work/$1/bin/ddpo" --version
  test "$("$work/$1/bin/python" -c 'from ddpo.ops import cpp; print(cpp.is_built)')" = "$2"
  "$work/$1/bin/python" - <<'PYTHON'
import torch
from ddpo import ddpo, linear_logp, sequence_sum

hidden = torch.randn(5, 8, requires_grad=True)
logp = sequence_sum(linear_logp(hidden, torch.randn(11, 8), torch.arange(5)), torch.tensor([0, 2, 5]))
ddpo(logp, logp.detach(), torch.tensor([[0, 1]]), torch.ones(1)).mean().backward()
assert torch.isfinite(hidden.grad).all()
PYTHON
  "$work/$1/bin/ddpo" doctor --json >"$work/$1.json"
  "$python" -c "import json, sys; assert json.load(open(sys.argv[1]))" "$work/$1.json"
  echo "$1: good"
)

pip() { # NAME ARGUMENTS: installs into that environment, from here alone
  local name=$1
  shift
  "$python" -m pip --python "$work/$name/bin/python" install -q --no-deps --no-build-isolation --no-index "$@"
}

cd "$root"
"$python" -m build --no-isolation --sdist --outdir "$work/dist" . >"$work/sdist.log" 2>&1 || { cat "$work/sdist.log"; exit 1; }
fresh folder
DDPO_BUILD_CPP=1 pip folder "$work"/dist/*.tar.gz
try folder True
fresh without-compiler
CXX=false CC=false DDPO_BUILD_CPP=auto pip without-compiler "$work"/dist/*.tar.gz
try without-compiler False
DDPO_BUILD_CPP=0 "$python" -m build --no-isolation --wheel --outdir "$work/dist" . >"$work/wheel.log" 2>&1 || { cat "$work/wheel.log"; exit 1; }
fresh wheel
pip wheel "$work"/dist/*.whl
try wheel False
