"""From an exception to what a person reads: an exit code and one line that names the way out."""

import errno
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

WRONG, INPUT = 1, 2  # exit codes: the machine or a check; the input
FULL = {errno.ENOSPC, errno.EDQUOT}
OF_THE_MACHINE = {*FULL, errno.EIO, errno.ENOMEM, errno.EMFILE}
OFFLINE = {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError", "ConnectError", "ProxyError"}
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
    old = "; ".join(f"{name} {version} is installed, wanted {wanted}" for name, version, wanted in too_old())
    if old:
        way_out = f"perhaps because {old}: `pip install -U` those; DDPO_TRACEBACK=1 shows where it happened"
    elif isinstance(err, ImportError):
        way_out = "the installation lacks it: `ddpo doctor` says what else, `pip install` mends it"
    else:
        way_out = "a mistake of ddpo or of a library: DDPO_TRACEBACK=1 shows where it happened; report it, please"
    what = "" if isinstance(err, ImportError) else f"unexpected {type(err).__name__}: "
    return WRONG, f"error: {what}{text[:400]}; {way_out}"


def requirements() -> list[tuple[str, str | None, str, bool]]:
    """(name, version that is installed or None, versions wanted, whether it fits) of each requirement of ddpo.

    Raises: ImportError without `packaging`, PackageNotFoundError where ddpo itself is not installed.
    """
    from packaging.requirements import Requirement

    found = []
    for one in map(Requirement, metadata.requires("ddpo") or ()):
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            version = installed(one.name)
            fits = version is not None and one.specifier.contains(version, prereleases=True)
            found.append((one.name, version, str(one.specifier), fits))
    return found


def installed(name: str) -> str | None:
    """A distribution's version; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def too_old() -> list[tuple[str, str, str]]:
    """(name, version, wanted) of each requirement of ddpo that is installed in another version than it wants."""
    try:
        return [(name, version, wanted) for name, version, wanted, fits in requirements() if version and not fits]
    except (ImportError, metadata.PackageNotFoundError):
        return []


@contextmanager
def named(kind: str, name: str) -> Iterator[None]:
    """Inside, what Hugging Face's libraries raise of a model, an adapter or a data set becomes one ValueError with the
    way out."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as err:
        if isinstance(err, OSError) and err.errno in OF_THE_MACHINE:
            raise
        if isinstance(err, RuntimeError | ImportError) and (_is_no_memory(err) or not _of_its_content(err)):
            raise
        raise ValueError(f"{kind} {name!r}: {_way_out(kind, name, err)}") from err
    except Exception as err:
        if type(err).__name__ != "SafetensorError":
            raise
        raise ValueError(f"{kind} {name!r}: its weights' file is damaged ({err}); get it again") from err


def _of_its_content(err: BaseException) -> bool:
    return any(words in str(err) for words in ("mismatch", "state_dict"))


def _chain(err: BaseException | None) -> Iterator[BaseException]:
    while err is not None:
        yield err
        err = err.__cause__ or err.__context__


def _way_out(kind: str, name: str, err: BaseException) -> str:
    kinds, text = {type(e).__name__ for e in _chain(err)}, " ".join(str(e) for e in _chain(err))
    url = f"https://huggingface.co/{'datasets/' if kind == 'data set' else ''}{name}"
    if "GatedRepoError" in kinds or "gated repo" in text:
        return f"is gated on the hub; accept its terms at {url} and log in (`hf auth login`), or give a folder"
    if "RepositoryNotFoundError" in kinds or "DatasetNotFoundError" in kinds or "not a valid model identifier" in text:
        return (
            f"there is no such folder, and none of that name at {url}, or it is private; check it, or `hf auth login`"
        )
    if kinds & OFFLINE or "couldn't connect" in text or "offline mode" in text.lower():
        return (
            "there is no such folder, and the hub cannot be reached (or HF_HUB_OFFLINE is set); check the name, give a "
            "folder, or download it where there is a network"
        )
    if "trust_remote_code" in text or "custom code" in text:
        return (
            "wants to run code of its own, which ddpo does not do for it; take a model that transformers has itself, "
            "or an encoder with --trust-remote-code"
        )
    if "HFValidationError" in kinds:
        return "there is no such folder, and it cannot be a name on the hub; check the path"
    first = " ".join(str(err).split())
    return f"cannot be loaded: {first[:300]}{'...' if len(first) > 300 else ''}"


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
        errno.EEXIST: "is there already, and is a file where a folder is wanted; give another path",
        errno.ENAMETOOLONG: "the name is too long; give a shorter one",
    }.get(err.errno or 0, said)
    return WRONG if err.errno in OF_THE_MACHINE else INPUT, f"error: {name}{hint if name else str(err)}"


def _is_no_memory(err: BaseException) -> bool:
    known = isinstance(err, MemoryError) or type(err).__name__ == "OutOfMemoryError"
    return known or (isinstance(err, RuntimeError) and any(words in str(err).lower() for words in NO_MEMORY))


def _is_ours(err: BaseException) -> bool:
    """Whether a line of ddpo raised it, which then says what to do."""
    frames = traceback.extract_tb(err.__traceback__)
    return bool(frames) and HERE in Path(frames[-1].filename).parents
