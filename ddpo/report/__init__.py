"""`ddpo report`: one HTML page about runs, their data and what they write."""

from pathlib import Path

from ddpo import log
from ddpo.config import ReportConfig
from ddpo.files import new_file
from ddpo.report.collect import collect
from ddpo.report.page import NO_PLOTLY, has_plotly, page


def report(cfg: ReportConfig) -> Path:
    """Writes the page and returns its path. Raises ValueError where there is nothing to show, RuntimeError where plotly
    is not installed."""
    if not has_plotly():
        raise RuntimeError(NO_PLOTLY)
    found = collect(cfg.runs, embeddings=cfg.embeddings, trust_remote_code=cfg.trust_remote_code)
    out = Path(cfg.out or Path(cfg.runs[0]) / "report.html")
    with new_file(out) as draft:
        draft.write_text(page(found, title(cfg.runs)), encoding="utf-8")
    log.console.print(f"report: {out} (open it in a browser)")
    log.answer(cfg, {"report": out, **{kind: sorted(things) for kind, things in found.items()}})
    return out


def title(folders: tuple[str, ...]) -> str:
    names = [Path(folder).resolve().name for folder in folders]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
