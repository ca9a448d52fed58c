"""Settings of `ddpo report`."""

from dataclasses import dataclass

from ddpo.config.checked import Checked


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Checked):
    """Writes one HTML page about one or several runs, to open from disk.

    A folder may be a run, a prepared folder, or one that holds such (as `ddpo demo` makes it); files of responses and
    of `ddpo evaluate --out` that lie in it are shown too. The page holds all it needs: loss, margin, accuracy and speed
    by step, quality against diversity, weights and deviations, a map of each prompt's responses, samples side by side,
    settings and machine.

    Example: ddpo report runs/demo
    """

    runs: tuple[str, ...]
    """Folders to report on."""
    out: str | None = None
    """HTML file to write, an older one is replaced; by default report.html in the first folder."""
    embeddings: str | None = None
    """Folder of kept embeddings, which place the responses on the map; by default the user's cache."""
    trust_remote_code: bool = False
    """Let the encoder's repository run its own code, as `ddpo prepare` was let."""
    json: bool = False
    """Print the page's path and the names of what it shows as one JSON object instead of a line."""
