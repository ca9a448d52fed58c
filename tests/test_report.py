"""What a report reads from folders, and that no text can leave its place in the page."""

import json
import re
from importlib import import_module

import numpy as np
import pytest
import torch
from conftest import STORIES

from ddpo.cli import main
from ddpo.config import EvaluateConfig, ReportConfig
from ddpo.evaluate import evaluate
from ddpo.report import collect, report, title
from ddpo.report.collect import histogram, on_a_plane
from ddpo.report.page import as_json, differing, page
from ddpo.train import train

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028 {{ 7 * 7 }} & done"


def write_responses(path, texts):
    rows = [{"prompt": p, "responses": [{"text": t} for t in texts]} for p, _ in STORIES]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, prepared_folder, model_folder):
    """A folder as a user has it: a run of three steps, responses before and after, and what evaluate found."""
    from conftest import SMALL

    from ddpo.config import TrainConfig

    folder = tmp_path_factory.mktemp("finished")
    data = {"data": prepared_folder, "eval_data": prepared_folder, "model": model_folder, "out": str(folder / "run")}
    train(TrainConfig(**{**SMALL, **data, "max_steps": 3, "eval_every": 2}))
    write_responses(folder / "before.jsonl", ["It was calm.", "It was calm, then."])
    write_responses(folder / "after.jsonl", ["A wave!", HOSTILE])
    settings = {"responses": str(folder / "after.jsonl"), "before": str(folder / "before.jsonl")}
    evaluate(EvaluateConfig(**settings, out=str(folder / "numbers.json"), measures=("style",)))
    (folder / "notes.txt").write_text("not ours")
    return folder


def test_collect(finished, prepared_folder):
    found = collect((str(finished),))
    assert list(found["runs"]) == ["run"] and list(found["responses"]) == ["before", "after"]
    assert list(found["evaluations"]) == ["numbers"] and list(found["prepared"]) == ["run: data"]
    run = found["runs"]["run"]
    assert run["steps"] == [1, 2, 3] and run["eval_steps"]
    assert {"loss", "margin", "accuracy", "tokens_per_s"} <= run["curves"].keys()
    assert len(run["eval_curves"]["loss"]) == len(run["eval_steps"])
    data = found["prepared"]["run: data"]
    assert data["summary"]["responses"] == 16 == sum(len(g["texts"]) for g in data["groups"])
    assert sum(data["weights"]["counts"]) == data["summary"]["pairs"] == sum(len(g["pairs"]) for g in data["groups"])
    first = data["groups"][0]
    for chosen, rejected, _ in first["pairs"]:
        assert first["scores"][chosen] > first["scores"][rejected]


def test_several_folders_have_names_of_their_own(finished):
    found = collect((str(finished), str(finished / "run")))
    assert list(found["runs"]) == [f"{finished.name}/run", "run"]


def test_a_run_that_goes_on(finished, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("method: ddpo\ndata: gone\n")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert collect((str(run),))["runs"]["run"]["curves"] == {"loss": [0.5]}


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_nothing_to_show(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match="is no folder" if name == "nothing" else "holds nothing to show; wanted a run"
    ):
        report(ReportConfig(runs=(str(tmp_path / name),)))
    assert not list(tmp_path.rglob("*.html"))


def test_plane_keeps_distances():
    """Points that lie on a plane keep their distances; n of one and of two have places too."""
    rows = torch.nn.functional.normalize(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]), dim=1)
    places = torch.from_numpy(on_a_plane(rows))
    assert torch.allclose(torch.cdist(places, places), torch.cdist(rows, rows).double(), atol=1e-6)
    assert on_a_plane(rows[:1]).tolist() == [[0, 0]] and on_a_plane(rows[:2]).shape == (2, 2)


def test_histogram():
    assert sum(histogram(np.array([0.0, 1.0, np.nan, 2.0]))["counts"]) == 3
    assert histogram(np.array([np.nan])) is None


def test_text_stays_text(finished):
    """The page has the scripts it names by hash and no other; JSON comes back as it went in."""
    out = report(ReportConfig(runs=(str(finished),)))
    html = out.read_text()
    assert out == finished / "report.html" and HOSTILE not in html and "alert(1)</script>" not in html
    assert len(re.findall(r"<script>", html)) == 2 and "49" not in re.findall(r"<h1>(.*)</h1>", html)[0]
    assert not re.search(r'(src|href)="(?!data:)', re.sub(r"<script>.*?</script>", "", html, flags=re.S))
    assert json.loads(as_json({"text": HOSTILE})) == {"text": HOSTILE}
    names = {"runs": {}, "prepared": {}, "evaluations": {}, "responses": {HOSTILE: []}}
    assert HOSTILE not in page(names, HOSTILE)


def test_plotly_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "plotly", None)
    with pytest.raises(RuntimeError, match=r'pip install "ddpo\[report\]"'):
        report(ReportConfig(runs=(str(tmp_path),)))


def test_json(finished, capsys):
    main(["report", str(finished), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["runs"] == ["run"] and told["report"].endswith("report.html")


def test_names_without_what_all_share(tmp_path):
    for name in ("a", "b"):
        run = tmp_path / name / "run"
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(f"method: ddpo\nseed: {name}\n")
        (run / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 0.5}\n')
    found = collect((str(tmp_path / "a"), str(tmp_path / "b")))
    assert list(found["runs"]) == ["a", "b"] and found["runs"]["a"]["curves"]["loss"] == [None, 0.5]
    assert differing(found["runs"]) == {"seed": ["a", "b"]}
    assert title(tuple("abcd")) == "a, b, c and 1 more" and title((str(tmp_path / "a" / "."),)) == "a"


def test_no_encoder_no_map(finished, monkeypatch):
    """The rest of the page is there, and says why the map is not."""

    def broken(cfg):
        raise ValueError("no such encoder")

    monkeypatch.setattr(import_module("ddpo.report.collect"), "load_measures", broken)  # also a function of that name
    (data,) = collect((str(finished),))["prepared"].values()
    assert data["map_of"] is None and "no such encoder" in data["no_map"] and data["groups"][0]["x"][0] is None
    assert (
        "no such encoder" in report(ReportConfig(runs=(str(finished),), out=str(finished / "no-map.html"))).read_text()
    )
