"""Weights in the prepared folder against the reference, `ddpo weigh`, and folders that are damaged."""

import hashlib
import itertools

import numpy as np
import pytest
import torch

from ddpo import reference
from ddpo.config import WeighConfig
from ddpo.data.groups import read_jsonl, write_jsonl
from ddpo.data.prepared import Prepared
from ddpo.deviation import crpo_weights, report
from ddpo.encoders import Encoder, style_features
from ddpo.files import read_json, sha256, write_json
from ddpo.weigh import weigh

FOUR = ("groups", "responses", "pairs", "deviation")
UNEVEN = [
    ("A", [("The sea was calm.", 3), ("No sea here, just sand!", None), ("Waves; more waves...", 1), ("SHOUT", 3)]),
    ("B", [("Alone.", 4)]),
    ("C", [("Up, up", 2), ("Hills? I walked all day.", 4), ("Up, up", 4), ("Grass: 12", 9), ("I am", None)]),
]
OPTIONS = [
    {},
    {"metric": "euclidean"},
    {"min_deviation": 0.3},
    {"release_floor": True},
    {"normalise_over": "pairs"},
    {"normalise_over": "pairs", "metric": "euclidean", "min_deviation": 0.1},
]


def columns(data):
    return {name: np.array(data.deviation[name]) for name in data.deviation.column_names}


def expected(data, metric="cosine", normalise_over="all", min_deviation=0.0, release_floor=False):
    """Distance, deviation and weight of each response by the reference, nan for those that do not enter."""
    result = torch.full((3, len(data.responses)), torch.nan, dtype=torch.float64)
    in_pairs = set(data.pairs.ravel().tolist())
    for a, b in itertools.pairwise(data.group_offsets().tolist()):
        rows = [r for r in range(a, b) if normalise_over == "all" or r in in_pairs]
        if rows:
            d = reference.mean_distance(style_features(data.texts(rows)).double(), metric)
            g = reference.deviation([d], min_deviation=min_deviation)
            result[:, rows] = torch.stack([d, g, reference.weights(g, release_floor)])
    return dict(zip(("distance_style", "deviation", "weight"), result.numpy(), strict=True))


def check(data, **options):
    wanted, got = expected(data, **options), columns(data)
    assert got.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(data.weight, got["weight"][data.pairs[:, 0]])
    assert np.isfinite(data.weight).all()
    assert data.manifest["summary"]["weights"] == report(torch.tensor(data.weight))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("groups", [None, UNEVEN], ids=["even", "uneven"])
def test_weights_are_the_references(make_prepared, groups, options):
    data = make_prepared(groups, **options)
    assert len(data.pairs) == (23 if groups is None else 6)
    check(data, **options)


@pytest.mark.parametrize("combine", ["geometric", "arithmetic"])
def test_two_measures(make_prepared, monkeypatch, combine):
    """A second measure that loads nothing: the style of every other letter."""
    encode = {"style": style_features, "semantic": lambda texts: style_features([t[::2] for t in texts])}
    monkeypatch.setattr(
        "ddpo.weighing.load_encoder", lambda name, measure, **_: Encoder(measure, measure, encode[measure])
    )
    data = make_prepared(UNEVEN, measures=("semantic", "style"), combine=combine)
    got = columns(data)
    assert got.keys() == {"distance_semantic", "distance_style", "deviation", "weight"}
    for a, b in itertools.pairwise(data.group_offsets()):
        texts = data.texts(range(a, b))
        distances = [reference.mean_distance(encode[m](texts).double()) for m in ("semantic", "style")]
        g = reference.deviation(distances, combine)
        np.testing.assert_allclose(got["deviation"][a:b], g, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got["weight"][a:b], reference.weights(g), rtol=1e-5, atol=1e-6)


def test_pairs_only_normalisation_leaves_the_others_out(make_prepared):
    data = make_prepared(UNEVEN, normalise_over="pairs")
    unused = sorted(set(range(10)) - set(data.pairs.ravel().tolist()))
    assert unused == [1, 4, 9]  # without a score, or alone
    assert np.isnan(columns(data)["weight"]).nonzero()[0].tolist() == unused


# --- CrPO's weight ----------------------------------------------------------------------------------------


def crpo_of(texts_of_group, pairs, scales):
    """By the reference: pairs of indices of one group; measures are style, and style of every other letter."""
    e = [style_features([t[::2] for t in texts_of_group]), style_features(texts_of_group)]
    u = torch.stack([reference.relative_distance(reference.mean_distance(x.double())) for x in e], 1)  # (n, k)
    return [float(reference.crpo(u[c], u[r], torch.tensor(scales, dtype=torch.float64))) for c, r in pairs]


@pytest.fixture
def two_measures(monkeypatch):
    encode = {"style": style_features, "semantic": lambda texts: style_features([t[::2] for t in texts])}
    monkeypatch.setattr(
        "ddpo.weighing.load_encoder", lambda name, measure, **_: Encoder(measure, f"two-{measure}", encode[measure])
    )
    return ("semantic", "style")


@pytest.mark.parametrize("scales", [(), (2.0, 0.25)])
def test_crpo_weighs_by_both_responses(make_prepared, two_measures, scales, capsys):
    options = {"measures": two_measures, "weighting": "crpo", "crpo_scales": scales}
    data = make_prepared(UNEVEN, **options)
    wanted = np.zeros(len(data.pairs))
    for g, (a, b) in enumerate(itertools.pairwise(data.group_offsets().tolist())):
        here = data.pair_group == g
        if here.any():
            wanted[here] = crpo_of(data.texts(range(a, b)), data.pairs[here] - a, scales or (0.5, 0.5))
    np.testing.assert_allclose(data.weight, wanted, rtol=1e-4, atol=1e-6)
    assert (data.weight == 0).any() and data.manifest["summary"]["weights"] == report(torch.tensor(data.weight))
    deviations = columns(data)
    weigh(WeighConfig(source=str(data.folder), measures=two_measures))
    np.testing.assert_equal(columns(Prepared(data.folder)), deviations)  # of responses, whatever weighs the pairs
    assert np.abs(Prepared(data.folder).weight - wanted).max() > 0.1
    weigh(WeighConfig(source=str(data.folder), **options))
    np.testing.assert_array_equal(Prepared(data.folder).weight, data.weight)
    assert "CrPO's weights: mean" in capsys.readouterr().out


def test_crpo_over_responses_in_pairs(make_prepared, two_measures):
    data = make_prepared(UNEVEN, measures=two_measures, weighting="crpo", normalise_over="pairs")
    for g, (a, b) in enumerate(itertools.pairwise(data.group_offsets().tolist())):
        here = data.pair_group == g
        used = sorted(set(data.pairs[here].ravel().tolist()) & set(range(a, b)))
        if used:
            wanted = crpo_of(data.texts(used), np.searchsorted(used, data.pairs[here]), (0.5, 0.5))
            np.testing.assert_allclose(data.weight[here], wanted, rtol=1e-4, atol=1e-6)


def test_crpo_of_preference_rows(two_measures, tmp_path):
    texts = ["The sea was calm.", "No sea here, just sand!", "Waves; more waves...", "SHOUT"]
    pairs = [(0, 1), (2, 3), (1, 0), (3, 2), (0, 3)]
    rows = [{"prompt": "p", "chosen": texts[c], "rejected": texts[r]} for c, r in pairs]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    cfg = {"source": str(tmp_path / "rows.jsonl"), "measures": two_measures, "weighting": "crpo"}
    weigh(WeighConfig(**cfg, out=str(tmp_path / "out.jsonl")))
    got = [row["weight"] for _, row in read_jsonl(tmp_path / "out.jsonl")]
    np.testing.assert_allclose(got, crpo_of(texts, pairs, (0.5, 0.5)), rtol=1e-4, atol=1e-6)


def test_crpo_weighs_no_responses(two_measures, groups_file, tmp_path):
    cfg = {"source": str(groups_file), "measures": two_measures, "weighting": "crpo"}
    with pytest.raises(ValueError, match="CrPO weighs pairs; wanted preference rows or a prepared folder, got groups"):
        weigh(WeighConfig(**cfg, out=str(tmp_path / "out.jsonl")))
    assert not (tmp_path / "out.jsonl").exists()


def test_crpo_wants_a_scale_for_each_measure():
    with pytest.raises(ValueError, match=r"crpo_scales must be a number of at least 0 for each of the 2 measures, got"):
        WeighConfig(source="x", weighting="crpo", crpo_scales=(1.0, -1.0))
    with pytest.raises(ValueError, match="crpo_scales are for weighting 'crpo'"):
        WeighConfig(source="x", crpo_scales=(1.0, 1.0))
    u = torch.rand(2, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"crpo_weights: wants a scale for each of 2 measures, got \[1.0\]"):
        crpo_weights(u, torch.tensor([[0, 1]]), [1.0])


# --- weighing again ---------------------------------------------------------------------------------------


def table_files(data):
    return sorted(p.name for p in data.folder.iterdir() if p.name != "manifest.json")


def test_weighing_again(make_prepared):
    old = make_prepared(UNEVEN)
    old_hash, old_files = old.manifest["content_hash"], old.manifest["files"]
    (old.folder / "heldout.jsonl").write_text("mine")
    assert weigh(WeighConfig(source=str(old.folder), measures=("style",), metric="euclidean")) == old.folder
    new = Prepared(old.folder)
    np.testing.assert_array_equal(new.pairs, old.pairs)
    check(new, metric="euclidean")
    assert np.abs(new.weight - old.weight).max() > 1e-3
    assert new.manifest["content_hash"] != old_hash
    files = new.manifest["files"]
    assert [n for n in FOUR if files[n] == old_files[n]] == ["groups", "responses"]
    assert table_files(new) == sorted(["heldout.jsonl", *(f["path"] for f in files.values())])  # the old ones are gone
    settings = {**old.manifest["settings"], "metric": "euclidean"}
    assert new.manifest["settings"] == settings
    assert {**new.manifest["summary"], "weights": 0} == {**old.manifest["summary"], "weights": 0}


def test_weighing_there_and_back_is_the_same_folder(make_prepared):
    old = make_prepared()
    before = {p.name: sha256(p) for p in old.folder.iterdir()}
    for changes in ({"min_deviation": 0.5}, {}):
        weigh(WeighConfig(source=str(old.folder), measures=("style",), **changes))
    assert {p.name: sha256(p) for p in old.folder.iterdir()} == before


def test_weighing_that_changes_nothing_keeps_the_files(make_prepared):
    old = make_prepared()
    weigh(WeighConfig(source=str(old.folder), measures=("style",)))
    assert Prepared(old.folder).manifest == old.manifest


@pytest.mark.parametrize("where", ["ddpo.data.prepared.write_json", "ddpo.data.prepared._write_table"])
def test_a_weighing_that_fails_leaves_the_old_weights(make_prepared, monkeypatch, where):
    old = make_prepared()
    tables = table_files(old)
    config = WeighConfig(source=str(old.folder), measures=("style",), min_deviation=0.5)

    def fail(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(where, fail)
        weigh(config)
    still = Prepared(old.folder)
    assert still.manifest == old.manifest and set(tables) <= set(table_files(still))
    check(still)
    weigh(config)
    check(Prepared(old.folder), min_deviation=0.5)
    assert len(table_files(old)) == 4  # what the failure left has gone too


def test_weighing_without_pairs(make_prepared):
    old = make_prepared([("A", [("a", 1), ("b", 1)])])
    weigh(WeighConfig(source=str(old.folder), measures=("style",), normalise_over="pairs"))
    assert Prepared(old.folder).weight.shape == (0,)


# --- the manifest, and folders that are damaged ------------------------------------------------------------


def test_manifest(make_prepared, model_folder):
    data = make_prepared(min_deviation=0.25)
    manifest = read_json(data.folder / "manifest.json")
    assert manifest["files"].keys() == set(FOUR)
    for name, file in manifest["files"].items():
        assert sha256(data.folder / file["path"]) == file["sha256"]
        assert file["path"] == f"{name}-{file['sha256'][:12]}.arrow"
    assert {n: f["rows"] for n, f in manifest["files"].items()} == dict(zip(FOUR, (4, 16, 23, 16), strict=True))
    whole = "".join(manifest["files"][n]["sha256"] for n in sorted(FOUR))
    assert manifest["content_hash"] == hashlib.sha256(whole.encode()).hexdigest()
    assert manifest["settings"]["min_deviation"] == 0.25 and manifest["settings"]["measures"] == ["style"]
    assert manifest["tokenizer"]["model"] == model_folder
    counts = {"prompts": 4, "responses": 16, "without_score": 0, "duplicate_texts": 0, "dropped": {}, "pairs": 23}
    assert manifest["summary"].items() >= counts.items()


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("damage", ["byte", "cut", "missing"])
def test_a_damaged_file_is_named(make_prepared, name, damage):
    data = make_prepared()
    path = data.folder / data.manifest["files"][name]["path"]
    content = bytearray(path.read_bytes())
    del data
    content[len(content) // 2] ^= 1
    path.unlink()
    if damage != "missing":
        path.write_bytes(content if damage == "byte" else content[:-1])
    with pytest.raises(ValueError, match=f"{path.name} is missing or damaged .* prepare it again"):
        Prepared(path.parent)


def test_no_prepared_folder(tmp_path):
    with pytest.raises(ValueError, match=r"is no prepared folder \(no manifest\.json\); make one with `ddpo prepare`"):
        Prepared(tmp_path)
    write_json(tmp_path / "manifest.json", {"format": 99})
    with pytest.raises(ValueError, match=r"manifest\.json: format 99, wanted 1; prepare it again"):
        Prepared(tmp_path)
