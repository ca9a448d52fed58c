"""Files that are there whole or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddpo.interrupts import undisturbed


def cache_folder() -> Path:
    """Where what can be made again is kept for the user: models unpacked, choices of `ddpo tune`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpo"


@contextmanager
def new_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder that appears under its name when the block ends, and not at all when the block raises.

    Raises: FileExistsError where a file of that name lies, or a folder unless overwrite.
    """
    path = Path(path)
    if path.is_file():
        raise FileExistsError(f"{path} is a file; wanted the name of a folder")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already; give another name or --overwrite")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir()
        yield draft
        place(draft, path, overwrite)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def place(draft: Path, path: Path, overwrite: bool = False) -> None:
    """Gives a folder that is whole its name, once all of it is on the disk. Raises FileExistsError."""
    for file in (p for p in draft.rglob("*") if p.is_file()):
        sync(file)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already; give another name or --overwrite")
    if path.exists():
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        with undisturbed():
            path.rename(old)
            draft.rename(path)
            shutil.rmtree(old)
    else:
        try:
            draft.rename(path)
        except OSError as err:
            if path.exists():  # another process was first
                raise FileExistsError(f"{path} exists already") from err
            raise
    sync(path.parent)


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """A file to write, put in place under its name (over an older one) when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield draft
        sync(draft)
        draft.replace(path)
        sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: str | Path, value) -> None:
    with new_file(path) as draft:
        draft.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def inside(folder: Path, name: str) -> Path:
    """The path of a file that another file names, which must lie in the folder itself.

    Raises: ValueError for a name with a folder in it (`..`, an absolute one) and for a link that leads elsewhere.
    """
    path = folder / str(name)
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name or "\\" in name:
        raise ValueError(f"{folder}: names a file {name!r}; wanted the plain name of a file in that folder")
    if path.is_symlink() and path.resolve().parent != folder.resolve():
        raise ValueError(f"{path}: is a link to {path.resolve()}; wanted a file in {folder}")
    return path


def hash_of_all(path: Path) -> str:
    """Of a file, or of a folder's files: their names and contents."""
    if path.is_file():
        return sha256(path)
    names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    return hashlib.sha256(json.dumps([(name, sha256(path / name)) for name in names]).encode()).hexdigest()


def sha256(path: str | Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Waits until the file's content, or the folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
