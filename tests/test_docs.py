"""README and docs/: commands parse, Python runs and prints what is shown, links lead somewhere, generated text is as
generated, quoted messages are in the source."""

import contextlib
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from documents import PAGES, anchors, as_pattern, blocks, links, shell_lines, strings_of_the_source, text_of
from documents import verb_and_options as parts_of

from ddpo.cli import VERBS
from ddpo.settings import parse

sys.path.insert(0, str(ROOT))
OTHER_PROGRAMS = (".", "head", "jq", "pip", "git", "cd", "python")  # lines of sh blocks that start none of our verbs


def test_every_page_is_listed():
    assert {f"docs/{path}" for path, _ in links("docs/README.md") if "/" not in path} == {*PAGES} - {
        "README.md",
        "docs/README.md",
    }


# --- commands -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page, command", [(page, line) for page in PAGES for line in shell_lines(page)])
def test_commands_parse(page, command, tmp_path, monkeypatch):
    """Verb, options and values, by the command line's own parser; make targets are there."""
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
    elif parts_of(command) is None:
        assert words[0] in OTHER_PROGRAMS, f"{page}: {command}"
    else:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "train.yaml").write_text("data: prepared\nout: runs/x\n")  # the reader's own files
        (tmp_path / "hinge.py").write_text("def hinge(logp, pairs): ...\n")
        verb, options = parts_of(command)
        _, cls, positional = VERBS[verb]
        assert isinstance(parse(cls, options, f"ddpo {verb}", positional), cls)


def test_commands_in_running_text():
    """`ddpo VERB --option` in a sentence: the verb and its options exist (values left out, ... for the rest)."""
    named = [(page, line) for page in PAGES for line in re.findall(r"`(ddpo [a-z]+[^`]*)`", prose(page))]
    assert len(named) > 20
    for page, line in named:
        _, verb, *rest = line.split()
        if verb not in VERBS:
            assert line in OTHER_VERBS, f"{page}: {line}"
            continue
        fields = VERBS[verb][1].__dataclass_fields__
        for option in (word[2:] for word in rest if word.startswith("--")):
            name = option.split("=")[0].replace("-", "_")
            assert name in (*fields, "help", "config") or name.removeprefix("no_") in fields, f"{page}: {line}"


OTHER_VERBS = ("ddpo report runs/demo", "ddpo export runs/x --merge --out merged", "ddpo doctor")  # see docs/README.md


def test_options_in_running_text():
    """`--option` alone in a sentence is an option of some verb, of a torchrun, or of a script."""
    known = {name.replace("_", "-") for _, cls, _ in VERBS.values() for name in cls.__dataclass_fields__}
    known |= {"help", "config", "rdzv-id", "shutdown-timeout", "write", "device", "option", "merge"}
    for page in PAGES:
        for option in re.findall(r"`--([a-z][a-z-]*)", prose(page)):
            assert option in known or option.removeprefix("no-") in known, f"{page}: --{option}"


def prose(page):
    return re.sub(r"^```.*?^```", "", text_of(page), flags=re.S | re.M)


def test_slurm_script():
    """bash reads it, torchrun knows its options, and the module it starts is the trainer."""
    from torch.distributed.run import get_args_parser

    (script,) = [text for _, text, _ in blocks("docs/distributed.md", "sh") if text.startswith("#!/bin/bash")]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=20)
    command = script[script.index("torchrun") :].replace("\\\n", " ").replace("$SLURM_NNODES", "2")
    arguments = get_args_parser().parse_args(shlex.split(command)[1:])
    assert arguments.module and arguments.training_script == "ddpo.train"
    assert arguments.training_script_args == ["--config", "train.yaml", "--resume"]


# --- Python, data -------------------------------------------------------------------------------------------


@pytest.fixture
def print_options():
    usual = vars(torch._tensor_str.PRINT_OPTS).copy()
    yield
    vars(torch._tensor_str.PRINT_OPTS).update(usual)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_runs(page, print_options):
    """A page's blocks one after the other in one namespace; a text block right behind one is what it prints. A block
    that begins `# not run` is compiled alone."""
    names = {}
    for _, code, (language, output) in blocks(page, "python"):
        compiled = compile(code, page, "exec")
        if code.startswith("# not run"):
            continue
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compiled, names)
        if language == "text":
            assert printed.getvalue() == output, page


def test_json_blocks_are_groups():
    from ddpo.data.groups import parse_group

    found = [(page, text) for page in PAGES for _, text, _ in blocks(page, "json")]
    assert len(found) >= 2
    for page, text in found:
        for line in text.splitlines():
            assert len(parse_group(json.loads(line), page).responses) == 2


# --- links, messages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for path, anchor in links(page):
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists() and target.is_relative_to(ROOT.resolve()), f"{page}: {path}"
        if anchor:
            assert anchor in anchors(target.relative_to(ROOT.resolve()).as_posix()), f"{page}: {path}#{anchor}"


def test_paths_in_running_text():
    """Paths of the source tree that are named without a link."""
    for page in PAGES:
        for path in re.findall(r"`((?:ddpo|tests|benchmarks|docs|csrc|kernels|recipes)/[\w./-]*)`", prose(page)):
            assert (ROOT / path).exists(), f"{page}: {path}"


MESSAGES = re.findall(r"^### `(.*)`$", text_of("docs/troubleshooting.md"), re.M)


def test_quoted_messages_are_in_the_source():
    assert len(MESSAGES) > 25 and len(set(MESSAGES)) == len(MESSAGES)
    source = "\n".join(" ".join(text.split()) for text in strings_of_the_source())
    missing = [message for message in MESSAGES if not re.search(as_pattern(message), source)]
    assert not missing


def test_a_message_that_is_not_there_is_missed():
    source = "\n".join(strings_of_the_source())
    assert not re.search(as_pattern("config: unknown ... ...; did you want ...?"), source)


# --- what is generated ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["README.md", "docs/speed.md"])
def test_generated_blocks(page):
    from benchmarks.readme import render

    assert render(page, text_of(page)) == text_of(page), "run python -m benchmarks.readme"


def test_config_page():
    """Every key of every verb, as the dataclasses have it."""
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "docs/generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    page = generate.config_page()
    assert page == text_of("docs/config.md"), "run python docs/generate.py"
    for verb, (_, cls, _) in VERBS.items():
        section = page[page.index(f"\n## ddpo {verb}\n") :]
        assert all(f"\n| `{name}` | " in section for name in vars(cls).get("__annotations__", {}))


def test_readme_is_short():
    assert text_of("README.md").count("\n") <= 240
