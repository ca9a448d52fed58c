"""The command `ddpo`: one verb a job. A verb's module is loaded when it runs, so that --help is quick."""

import difflib
import importlib
import sys

from ddpo import __version__
from ddpo.config import (
    AnnotateConfig,
    DemoConfig,
    DoctorConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    PlanConfig,
    PrepareConfig,
    ReportConfig,
    RewardConfig,
    ScoreConfig,
    TrainConfig,
    TuneConfig,
    WeighConfig,
    WinrateConfig,
)
from ddpo.settings import run_command

# verb -> module, settings, field that the first bare argument names (a tuple: all of them); the function is called like
# the verb
VERBS = {
    "prepare": ("ddpo.prepare", PrepareConfig, "source"),
    "weigh": ("ddpo.weigh", WeighConfig, "source"),
    "train": ("ddpo.train", TrainConfig, "data"),
    "plan": ("ddpo.plan", PlanConfig, "data"),
    "generate": ("ddpo.generate", GenerateConfig, "prompts"),
    "reward": ("ddpo.reward", RewardConfig, "source"),
    "score": ("ddpo.score", ScoreConfig, "responses"),
    "evaluate": ("ddpo.evaluate", EvaluateConfig, "responses"),
    "annotate": ("ddpo.annotate", AnnotateConfig, "responses"),
    "winrate": ("ddpo.winrate", WinrateConfig, "answers"),
    "report": ("ddpo.report", ReportConfig, "runs"),
    "export": ("ddpo.export", ExportConfig, "run"),
    "tune": ("ddpo.tune", TuneConfig, "model"),
    "demo": ("ddpo.demo", DemoConfig, None),
    "doctor": ("ddpo.doctor", DoctorConfig, None),
}
EXIT_CODES = {
    0: "done",
    1: "the machine failed (memory, disk, a part that is not installed), a check found something wrong, or ddpo did",
    2: "the input is wrong: an option, a file, a model's name; the line says what was wanted and the way out",
    130: "interrupted by Ctrl-C or SIGTERM; what was written is whole",
}


def usage() -> str:
    lines = [f"  {verb:<10} {str(cls.__doc__).splitlines()[0]}" for verb, (_, cls, _) in VERBS.items()]
    codes = [f"  {code:<10} {meaning}" for code, meaning in EXIT_CODES.items()]
    head, foot = "usage: ddpo VERB ...", "`ddpo VERB --help` lists a verb's options and an example."
    notes = (
        "--json: a verb's numbers as one JSON object on stdout. Environment: NO_COLOR=1 takes the colours away,\n"
        "DDPO_TRACEBACK=1 shows where an error happened."
    )
    return "\n".join([head, "", *lines, "", foot, "", "exit codes:", *codes, "", notes])


def main(argv: list[str] | None = None) -> None:
    verb, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb in ("-h", "--help"):
        print(usage())
    elif verb == "--version":
        print(__version__)
    elif verb in VERBS:
        module, cls, positional = VERBS[verb]
        run_command(
            lambda cfg: getattr(importlib.import_module(module), verb)(cfg), cls, f"ddpo {verb}", positional, rest
        )
    else:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(VERBS)}"
        print(f"error: unknown verb {verb!r}; {hint}", file=sys.stderr)
        sys.exit(2)
