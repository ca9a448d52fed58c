"""README's generated blocks are those of the committed results, and its Python runs."""

import re
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))
README = (ROOT / "README.md").read_text()


def test_generated_blocks():
    from benchmarks.readme import render

    assert render(README) == README, "run python -m benchmarks.readme"


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.S))
def test_python_blocks_run(code):
    exec(compile(code, "README.md", "exec"), {})


def test_json_block_is_a_group():
    import json

    from ddpo.data.groups import parse_group

    (line,) = re.findall(r"```json\n(.*?)\n```", README, re.S)
    assert len(parse_group(json.loads(line), "README.md:1").responses) == 2


def test_slurm_script():
    """bash reads it, torchrun knows its options, and the module it starts is the trainer."""
    import shlex
    import subprocess

    from torch.distributed.run import get_args_parser

    (script,) = re.findall(r"```sh\n(#!/bin/bash.*?)```", README, re.S)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    command = script[script.index("torchrun") :].replace("\\\n", " ").replace("$SLURM_NNODES", "2")
    arguments = get_args_parser().parse_args(shlex.split(command)[1:])
    assert arguments.module and arguments.training_script == "ddpo.train"
    assert arguments.training_script_args == ["--config", "train.yaml", "--resume"]
