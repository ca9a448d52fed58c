"""From an exception to what a person reads: an exit code and one line that names the way out."""

import errno
import traceback
from pathlib import Path

WRONG, INPUT = 1, 2  # exit codes: the machine or a check; the input
FULL = {errno.ENOSPC, errno.EDQUOT}
OF_THE_MACHINE = {*FULL, errno.EIO, errno.ENOMEM, errno.EMFILE}
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory")
HERE = Path(__file__).parent


def explain(err: BaseException) -> tuple[int, str]:
    """(exit code, line) of what a command raised."""
    text = str(err) or type(err).__name__
    if isinstance(err, KeyboardInterrupt):
        return 130, "interrupted"
    if _is_no_memory(err):
        return WRONG, (
            f"error: out of memory ({text.splitlines()[0][:200]}); take smaller parts (--micro-tokens of train, "
            "--batch-size of generate, --max-tokens of score), --activation-checkpointing, or a smaller model; `ddpo "
            "plan` says what a run needs"
        )
    if isinstance(err, OSError) and err.errno is not None:
        return _of_files(err)
    if isinstance(err, ValueError | OSError):
        return INPUT, f"error: {text}"
    if isinstance(err, RuntimeError | ImportError) and _is_ours(err):
        return WRONG, f"error: {text}"
    if isinstance(err, ModuleNotFoundError):
        return WRONG, f"error: {text}; the installation lacks it: `ddpo doctor` says what else, `pip install` mends it"
    return WRONG, (
        f"error: unexpected {type(err).__name__}: {text}; this is a mistake of ddpo or of a library: set "
        "DDPO_TRACEBACK=1 to see where, and report it"
    )


def _of_files(err: OSError) -> tuple[int, str]:
    name = f"{err.filename}: " if err.filename else ""
    said = (err.strerror or str(err)).lower()
    if err.errno in FULL:
        return WRONG, f"error: {name}{said}; make room (`ddpo doctor` lists the caches) or write to another disk"
    hint = {
        errno.ENOENT: "there is no such file or folder; check the name",
        errno.EISDIR: "is a folder; wanted a file",
        errno.ENOTDIR: "a part of the path is a file; wanted a folder",
        errno.EACCES: "may not be read or written; give another path, or change its permissions",
        errno.EPERM: "may not be read or written; give another path, or change its permissions",
        errno.EROFS: "lies on a disk that cannot be written to; give another path",
        errno.ENAMETOOLONG: "the name is too long; give a shorter one",
    }.get(err.errno, said)
    return WRONG if err.errno in OF_THE_MACHINE else INPUT, f"error: {name}{hint if name else str(err)}"


def _is_no_memory(err: BaseException) -> bool:
    known = isinstance(err, MemoryError) or type(err).__name__ == "OutOfMemoryError"
    return known or (isinstance(err, RuntimeError) and any(words in str(err).lower() for words in NO_MEMORY))


def _is_ours(err: BaseException) -> bool:
    """Whether a line of ddpo raised it, which then says what to do."""
    frames = traceback.extract_tb(err.__traceback__)
    return bool(frames) and HERE in Path(frames[-1].filename).parents
