"""The page itself: a template, one style sheet, one script, plotly, and the data as JSON that no text can leave."""

import base64
import hashlib
import json
from importlib import resources

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from ddpo import __version__

ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


NO_PLOTLY = 'report: plotly draws its charts and is not installed; `pip install "ddpo[report]"`'


def has_plotly() -> bool:
    try:
        import plotly  # noqa: F401
    except ImportError:
        return False
    return True


def page(found: dict, title: str) -> str:
    """HTML that needs nothing else. found: see collect.

    A prompt's responses are a JSON block of their own, read when the prompt is looked at, so that a page of many opens
    at once. Scripts are allowed by their hashes, and nothing may be loaded from anywhere.
    """
    from plotly.offline import get_plotlyjs

    scripts = [Markup(get_plotlyjs()), Markup(_read("report.js"))]
    blocks: list[dict] = []

    def listed(groups: list[dict]) -> list[dict]:
        blocks.extend(groups)
        first = len(blocks) - len(groups)
        return [{"prompt": group["prompt"], "block": first + i} for i, group in enumerate(groups)]

    prepared = {name: {**data, "groups": listed(data["groups"])} for name, data in found["prepared"].items()}
    responses = {name: listed(groups) for name, groups in found["responses"].items()}
    runs = {name: {k: v for k, v in run.items() if k not in ("config", "card")} for name, run in found["runs"].items()}
    environment = Environment(loader=PackageLoader("ddpo.report", "."), autoescape=select_autoescape(["html"]))
    return environment.get_template("page.html").render(
        title=title,
        version=__version__,
        style=Markup(_read("report.css")),
        scripts=scripts,
        hashes=[_source_hash(script) for script in scripts],
        data=as_json({**found, "runs": runs, "prepared": prepared, "responses": responses}),
        blocks=[as_json(block) for block in blocks],
        found=found,
        differing=differing(found["runs"]),
    )


def differing(runs: dict) -> dict[str, list]:
    """Settings, machine and versions that are not the same in all runs: a value a run."""
    parts = [
        {**run["config"], **run["card"].get("machine", {}), **run["card"].get("versions", {})} for run in runs.values()
    ]
    columns = {key: [part.get(key) for part in parts] for part in parts for key in part}
    return {key: values for key, values in columns.items() if any(value != values[0] for value in values)}


def as_json(value) -> Markup:
    """JSON to stand inside <script>: no character in it can end the element or start another."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)
    for character, escape in ESCAPES.items():
        text = text.replace(character, escape)
    return Markup(text)


def _source_hash(script: str) -> str:
    """As a Content-Security-Policy names an inline script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _read(name: str) -> str:
    return resources.files("ddpo.report").joinpath(name).read_text(encoding="utf-8")
