"""`ddpo doctor`: whether the installation is sound, which kernels run here and why, and what to do where it lacks."""

from rich.table import Table

from ddpo import __version__, log
from ddpo.config import DoctorConfig
from ddpo.probes import Finding, caches, environment, kernels, machine, models, packages, pytorch

PROBES = (machine, packages, pytorch, kernels, models, caches, environment)
MARKS = {"ok": "", "note": "!", "broken": "BROKEN"}
STYLES = {"ok": None, "note": "yellow", "broken": "bold red"}


def doctor(cfg: DoctorConfig) -> dict:
    """Prints the findings and returns {"ddpo": version, "sound": bool, "findings": [...]}.

    Raises: SystemExit(1) where something that is required is broken.
    """
    findings = [finding for probe in PROBES for finding in probe()]
    broken = [f for f in findings if f.state == "broken"]
    result = {"ddpo": __version__, "sound": not broken, "findings": [f._asdict() for f in findings]}
    show(findings)
    log.answer(cfg, result)
    if broken:
        raise SystemExit(1)
    return result


def show(findings: list[Finding]) -> None:
    table = Table(title=f"ddpo {__version__}", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    table.show_header = False
    section = None
    for f in findings:
        if f.section != section:
            section = f.section
            table.add_row("", section.upper(), "", style="bold")
        found = f"{f.found}\n-> {f.way_out}" if f.way_out else f.found
        table.add_row(MARKS[f.state], f.name, found, style=STYLES[f.state])
    log.console.print(table)
    num = {state: sum(f.state == state for f in findings) for state in MARKS}
    log.console.print(
        f"{num['broken']} broken, {num['note']} that could be better"
        + ("" if num["broken"] else "; what is required is there")
    )
