"""The demo's folder is made anew, and never somebody else's removed."""

import pytest

from ddpo.demo import clear
from ddpo.ledger import write_card


def test_clear(tmp_path):
    out = tmp_path / "demo"
    clear(out)
    for name in ("before", "after"):  # what generate leaves
        write_card(out / f"{name}.jsonl", {})
        (out / f"{name}.jsonl").touch()
    (out / ".after.jsonl.0.part").touch()  # and one that was killed
    (out / "prepared").mkdir()
    clear(out)
    assert out.is_dir() and not list(out.iterdir())
    (out / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match=r"holds thesis.txt, which no demo wrote"):
        clear(out)
    assert (out / "thesis.txt").exists()
