"""Embeddings that are kept: each text once, in order, over kills and processes; and data weighed row by row."""

import json
import subprocess
import sys
import time
import warnings

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import STORIES, write_groups

from ddpo import reference, weigh_dataset
from ddpo.config import WeighConfig
from ddpo.data.groups import read_jsonl
from ddpo.embedded import Embedded
from ddpo.encoders import Encoder, style_features
from ddpo.weigh import weigh

TEXTS = ["a b c", "Ä long text, with marks!", "a b c", "d", ""]


def counting():
    """An encoder of lengths and first letters, and the texts it was given."""
    given = []

    def encode(texts):
        given.extend(texts)
        return torch.tensor([[len(t), ord((t + " ")[0])] for t in texts], dtype=torch.float32)

    return Encoder("test", "test-1", encode), given


def test_each_text_once(tmp_path):
    encoder, given = counting()
    embedded = Embedded(encoder, tmp_path)
    expected = torch.tensor([[len(t), ord((t + " ")[0])] for t in TEXTS], dtype=torch.float32)
    assert torch.equal(embedded.rows(TEXTS), expected)
    assert sorted(given) == sorted(set(TEXTS)) and given == sorted(given, key=len)  # shortest first
    assert torch.equal(embedded.rows(TEXTS[::-1]), expected.flip(0))
    assert torch.equal(Embedded(encoder, tmp_path).rows([*TEXTS, "new"])[:5], expected)
    assert sorted(given) == sorted({*TEXTS, "new"})
    other, given = counting()
    Embedded(Encoder("test", "test-2", other.encode), tmp_path).rows(["d"])  # another encoder shares nothing
    assert given == ["d"]
    with pytest.raises(ValueError, match="test: there is no text to encode"):
        embedded.rows([])


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    """What was encoded before a failure stays; a draft is not read; a damaged file is named."""
    monkeypatch.setattr("ddpo.embedded.FILE_TEXTS", 2)
    monkeypatch.setattr("ddpo.embedded.BATCH_TEXTS", 1)
    encoder, given = counting()

    def fails(texts):
        if len(given) == 5:
            raise OSError("out of something")
        return encoder.encode(texts)

    texts = [f"{'x' * i}" for i in range(1, 9)]
    with pytest.raises(OSError, match="out of something"):
        Embedded(Encoder("test", "test-1", fails), tmp_path).rows(texts)
    (tmp_path / "test-1" / ".draft.arrow").write_text("half")
    given.clear()
    assert Embedded(encoder, tmp_path).rows(texts)[:, 0].tolist() == list(range(1, 9))
    assert given == texts[4:]
    path = next(p for p in (tmp_path / "test-1").glob("*.arrow") if not p.name.startswith("."))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{path.name} is damaged .*; delete it, its texts are encoded again"):
        Embedded(encoder, tmp_path)


def test_an_encoders_key_tells_its_content(tmp_path):
    """Another prompt, another weight: another key; the same twice: the same."""
    from transformers import BertConfig, BertModel

    from ddpo.encoders import load_encoder

    sizes = {"vocab_size": 60, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = BertModel(BertConfig(**sizes, intermediate_size=8, max_position_embeddings=32))
    save_bert(model, tmp_path / "a")
    with torch.no_grad():
        model.pooler.dense.bias[0] += 1e-3
    save_bert(model, tmp_path / "b")
    a, b, prompted = (
        load_encoder(str(tmp_path / name), "semantic", prompt=prompt)
        for name, prompt in (("a", None), ("b", None), ("a", "style: "))
    )
    assert a.key == load_encoder(str(tmp_path / "a"), "semantic").key
    assert len({a.key.split("-")[-1], b.key.split("-")[-1], prompted.key.split("-")[-1]}) == 3
    assert not torch.equal(a(["x"]), prompted(["x"]))
    with pytest.raises(ValueError, match="knows no tasks, so none is called 'text-matching'"):
        load_encoder(str(tmp_path / "a"), "semantic", task="text-matching")


def save_bert(model, folder):
    from sentence_transformers import SentenceTransformer, models
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz:"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    model.save_pretrained(folder / "bert")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    transformer = models.Transformer(str(folder / "bert"))
    SentenceTransformer(modules=[transformer, models.Pooling(8)]).save(str(folder))


# --- data weighed row by row ------------------------------------------------------------------------------


def expected_weights(texts):
    return reference.weights(reference.deviation([reference.mean_distance(style_features(texts).double())]))


def test_groups_in_weights_out(tmp_path):
    source, out = write_groups(tmp_path / "groups.jsonl"), tmp_path / "weighed.jsonl"
    weigh(WeighConfig(source=str(source), out=str(out), measures=("style",)))
    for (_, row), (prompt, responses) in zip(read_jsonl(out), STORIES, strict=True):
        assert row["prompt"] == prompt and [(r["text"], r["score"]) for r in row["responses"]] == responses
        found = [r["weight"] for r in row["responses"]]
        np.testing.assert_allclose(found, expected_weights([t for t, _ in responses]), rtol=1e-5, atol=1e-6)
        assert all(r.keys() == {"text", "score", "distance_style", "deviation", "weight"} for r in row["responses"])
    with pytest.raises(FileExistsError, match="exists already"):
        weigh(WeighConfig(source=str(source), out=str(out), measures=("style",)))
    with pytest.raises(ValueError, match="is no prepared folder; name the file or folder to make with --out"):
        weigh(WeighConfig(source=str(source), measures=("style",)))
    with pytest.raises(ValueError, match="wants the pairs of a prepared folder"):
        weigh(WeighConfig(source=str(source), out=str(tmp_path / "x"), measures=("style",), normalise_over="pairs"))
    assert not (tmp_path / "x").exists()


PAIRS = [
    {"prompt": "A", "chosen": "one of them", "rejected": "two!", "id": 7},
    {"prompt": "A", "chosen": "Three, three", "rejected": "two!", "id": 8},
    {"prompt": "B", "chosen": "x", "rejected": "yy yy", "id": 9},
]


def test_preference_rows(tmp_path):
    """As a data set on disk and in Python: every key kept, one weight a row, equal to the chosen response's."""
    source, out = tmp_path / "pairs.jsonl", tmp_path / "weighed"
    source.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    weigh(WeighConfig(source=str(source), out=str(out), measures=("style",)))
    loaded = datasets.load_from_disk(str(out))
    assert [{k: v for k, v in row.items() if k != "weight"} for row in loaded] == PAIRS
    of_a = expected_weights(["one of them", "two!", "Three, three"])
    np.testing.assert_allclose(loaded["weight"][:], [of_a[0], of_a[2], 1.0], rtol=1e-5, atol=1e-6)
    in_python = weigh_dataset(datasets.Dataset.from_list(PAIRS), measures=("style",))
    assert in_python.to_list() == loaded.to_list()
    assert sorted(p.suffix for p in out.iterdir()) == [".arrow", ".json", ".json"]


def test_weights_that_weigh_nothing_are_told(tmp_path, capsys):
    """A pair a prompt: as good as no weights."""
    alone = [PAIRS[0], PAIRS[2]]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alone))
    weigh(WeighConfig(source=str(tmp_path / "pairs.jsonl"), out=str(tmp_path / "w.jsonl"), measures=("style",)))
    assert "weights: all 2 are 1, as good as none; to differ" in " ".join(capsys.readouterr().out.split())
    with pytest.warns(UserWarning, match="all weights are 1, as good as none"):
        weigh_dataset(datasets.Dataset.from_list(alone), measures=("style",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weigh_dataset(datasets.Dataset.from_list(PAIRS), measures=("style",))


def test_types_are_those_of_all_rows(tmp_path):
    """A score that is null for long, a key that comes late, whole numbers before fractions."""
    source, out = tmp_path / "groups.jsonl", tmp_path / "weighed"
    rows = [{"prompt": f"p{i}", "responses": [{"text": "a b", "score": None}, {"text": "c!"}]} for i in range(1500)]
    rows += [{"prompt": "q", "responses": [{"text": "a b", "score": 1.5, "late": "x"}], "day": "2020-01-01"}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    weigh(WeighConfig(source=str(source), out=str(out), measures=("style",)))
    loaded = datasets.load_from_disk(str(out))
    assert len(loaded) == 1501 and loaded[1500]["day"] == "2020-01-01" and loaded[0]["day"] is None
    assert loaded[1500]["responses"][0]["score"] == 1.5 and loaded[1500]["responses"][0]["late"] == "x"


def test_embeddings_that_are_not_finite_are_not_kept(tmp_path):
    broken = Encoder("test", "test-1", lambda texts: torch.full((len(texts), 2), torch.nan))
    with pytest.raises(ValueError, match="test: the embedding of 'a text' is not finite"):
        Embedded(broken, tmp_path).rows(["a text"])
    assert not list(tmp_path.rglob("*.arrow"))


def test_a_prepared_folder_is_weighed_in_place(make_prepared, tmp_path):
    folder = make_prepared().folder
    with pytest.raises(ValueError, match="is weighed in place; leave --out away"):
        weigh(WeighConfig(source=str(folder), out=str(tmp_path / "x"), measures=("style",)))


def test_a_bad_row_leaves_nothing(tmp_path):
    source = write_groups(tmp_path / "groups.jsonl")
    source.write_text(source.read_text() + '{"prompt": "C"}\n')
    for out in (tmp_path / "weighed.jsonl", tmp_path / "weighed"):
        with pytest.raises(ValueError, match=r"groups.jsonl:5: 'responses' must be a list"):
            weigh(WeighConfig(source=str(source), out=str(out), measures=("style",)))
    assert [p.name for p in tmp_path.iterdir()] == ["groups.jsonl"]


def test_windows_hold_whole_groups(tmp_path, monkeypatch):
    monkeypatch.setattr("ddpo.weigh.WINDOW", 5)
    source = write_groups(tmp_path / "groups.jsonl")
    weigh(WeighConfig(source=str(source), out=str(tmp_path / "few.jsonl"), measures=("style",)))
    monkeypatch.undo()
    weigh(WeighConfig(source=str(source), out=str(tmp_path / "all.jsonl"), measures=("style",)))
    assert (tmp_path / "few.jsonl").read_bytes() == (tmp_path / "all.jsonl").read_bytes()


def test_after_a_kill_it_goes_on(tmp_path):
    """kill -9 while encoding: the second run encodes only what no file held."""
    source = write_groups(
        tmp_path / "groups.jsonl", [(f"p{i}", [(f"{i} {'x' * j}", j) for j in range(8)]) for i in range(900)]
    )
    command = [sys.executable, "-m", "ddpo", "weigh", source, "--out", tmp_path / "out.jsonl"]
    command += ["--measures", "style", "--embeddings", tmp_path / "kept"]
    running = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while not list((tmp_path / "kept").rglob("[!.]*.arrow")):
            assert running.poll() is None and time.monotonic() < until
            time.sleep(0.05)
    finally:
        running.kill()
        running.wait()
    kept = [pa.ipc.open_file(str(p)).read_all().num_rows for p in (tmp_path / "kept").rglob("[!.]*.arrow")]
    assert 0 < sum(kept) < 7200 and not (tmp_path / "out.jsonl").exists()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True, timeout=300)
    kept = [pa.ipc.open_file(str(p)).read_all().num_rows for p in (tmp_path / "kept").rglob("[!.]*.arrow")]
    assert sum(kept) == 7200 and "of 7,200" in done.stdout  # no text twice
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 900
