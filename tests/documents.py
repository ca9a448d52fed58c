"""README and docs/ taken apart: blocks, commands, links, messages."""

import ast
import re
import shlex
from itertools import pairwise

from conftest import ROOT

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page, *languages):
    """(language, text, the same two of the block right behind it) of each fenced block in one of the languages."""
    text = text_of(page)
    found = list(re.finditer(r"^```(\w*)\n(.*?)^```", text, re.S | re.M))
    behind = [b.groups() if not text[a.end() : b.start()].strip() else (None, None) for a, b in pairwise(found)]
    found = zip(found, [*behind, (None, None)], strict=False)  # a page without a block has nothing behind one
    return [(*block.groups(), then) for block, then in found if block[1] in languages]


def shell_lines(page):
    """Commands of the page's sh blocks and of its console sessions, comments off; scripts are another matter."""
    texts = [text for _, text, _ in blocks(page, "sh", "bash") if not text.startswith("#!")]
    texts += [line[2:] for _, text, _ in blocks(page, "text") for line in text.splitlines() if line.startswith("$ ")]
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|\s+)#.*", "", line).strip() for line in lines) if line]


def verb_and_options(command):
    """(verb, options) of a line that starts ddpo, by itself or under torchrun; None for another program's."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
        words = ["ddpo", "train", *words[1:]] if words[0] == "ddpo.train" else words
    return (words[1], words[2:]) if words[0] == "ddpo" else None


def links(page):
    """(target, anchor) of links and pictures to files here."""
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```|<!--.*?-->", "", text_of(page), flags=re.S))
    return [(path, anchor) for path, _, anchor in (f.partition("#") for f in found) if "://" not in path]


def anchors(page):
    """The names that headings get."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", text_of(page), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def strings_of_the_source():
    """Every text in the package's code, what is put into it as a zero byte, whitespace as one space."""
    found = []
    for path in (ROOT / "ddpo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def as_pattern(message):
    """A quoted message, `...` for anything, as an expression."""
    return ".*".join(re.escape(part) for part in message.strip(". ").split("..."))
