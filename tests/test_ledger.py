"""What a job had done before a kill is there; what it had half written, or another job's, is not."""

import pytest

from ddpo.ledger import Ledger, card_path, is_made, write_card


def test_results_are_kept(tmp_path):
    out, key = tmp_path / "out.jsonl", {"seed": 0}
    first = Ledger(out, key)
    assert first.done == {}
    first.add({"a": {"x": 1}})
    first.add({"b": {"x": 2}, "c": {"x": 3}})
    part = next(tmp_path.glob(".out.jsonl.*.part"))
    torn = part.read_bytes()[:-4]  # killed in the middle of its last line
    part.write_bytes(torn)
    second = Ledger(out, key)
    assert second.done == {"a": {"x": 1}, "b": {"x": 2}}
    second.add({"d": {"x": 4}})
    assert second.collect() == {"a": {"x": 1}, "b": {"x": 2}, "d": {"x": 4}}
    assert Ledger(out, {"seed": 1}).done == {}  # other settings: begun anew
    second.finish([{"x": 1}])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.card.json", "out.jsonl"]


def test_a_whole_line_without_its_end_is_torn(tmp_path):
    ledger = Ledger(tmp_path / "o", {})
    ledger.add({"a": {}})
    part = next(tmp_path.iterdir())
    part.write_bytes(part.read_bytes()[:-1])
    ledger = Ledger(tmp_path / "o", {})
    assert ledger.done == {}
    ledger.add({"b": {}})
    assert Ledger(tmp_path / "o", {}).done == {"b": {}}


def test_what_is_made(tmp_path, capsys):
    out, key = tmp_path / "after.jsonl", {"seed": 0, "of": (1, 2)}
    assert not is_made(out, key, resume=True, overwrite=False)
    write_card(out, key)
    out.write_text("whole")
    assert card_path(out).name == "after.card.json"
    with pytest.raises(FileExistsError, match="--resume to keep"):
        is_made(out, key, resume=False, overwrite=False)
    assert is_made(out, key, resume=True, overwrite=False) and "made from the same" in capsys.readouterr().out
    assert not is_made(out, key, resume=True, overwrite=True)
    with pytest.raises(FileExistsError, match=r"something else \(\['seed'\]\)"):
        is_made(out, {**key, "seed": 1}, resume=True, overwrite=False)
    card_path(out).unlink()
    with pytest.raises(FileExistsError, match="unknown settings"):
        is_made(out, key, resume=True, overwrite=False)
