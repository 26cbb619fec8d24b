"""Where text comes from: SOURCE is stdlib, installed, a file, or a folder of text or of prepared shards.

A source gives its documents one after the other, in the same order each time and in bounded memory: a long one comes
in parts. What cannot be read is an error in a file that the user named; elsewhere it is skipped and listed.
"""

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from minillm.config import UserError
from minillm.data.readers import ENDINGS, ending, read

_LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Document:
    """One text, or one part of a long one (a book, a file of gigabytes).

    `part` 0 begins a document; a higher one goes on where the part before it ended, after a newline where there is one.
    """

    name: str
    text: str
    part: int = 0


@dataclass
class Source:
    """Documents of some files; `open_source` makes one.

    name         what the user called it
    files        (name, path) of each file, sorted by name
    root         no file may lead out of this folder, by a link; None: wherever
    strict       the user named the file: what cannot be read is an error, not skipped
    prepared     the folder of prepared shards, where it is one; it has no documents then
    skipped      (name, reason) of what could not be read, filled by `documents`
    """

    name: str
    files: list[tuple[str, Path]]
    root: Path | None = None
    strict: bool = False
    prepared: Path | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def is_prepared(self) -> bool:
        return self.prepared is not None

    @property
    def by_position(self) -> bool:
        """One plain text: its last part is what validates, as in nanoGPT."""
        return self.strict and not self.is_prepared and ending(self.files[0][1]) in (".txt", ".md", ".py")

    @property
    def size(self) -> int | None:
        """Bytes of text, for progress; None where only reading tells (.jsonl, .parquet)."""
        if self.is_prepared or any(ending(path) not in (".txt", ".md", ".py") for _, path in self.files):
            return None
        return self.stored

    @property
    def stored(self) -> int:
        """Bytes of the files as they lie on the disk, packed or not."""
        return sum(path.stat().st_size for _, path in self.files if path.is_file())

    def documents(self) -> Iterator[Document]:
        """Each document, or its parts in order. Empty texts are documents too.

        Raises `UserError` for a file that the user named and that cannot be read, with the place in it.
        """
        self.skipped.clear()
        for name, path in self.files:
            if self.root is not None and not path.resolve().is_relative_to(self.root):
                self.skipped.append((name, "a link that leads out of the folder"))
                continue
            if not path.is_file():  # a link to nothing; a pipe, which would never end
                self.skipped.append((name, "no file that can be read"))
                continue
            skip = None if self.strict else lambda where, reason: self.skipped.append((where, reason))
            for where, text, part in read(name, path, skip):
                yield Document(where, text, part)


def open_source(source: str) -> Source:
    """What `source` names. Raises `UserError` for a missing path, an empty file, an unknown ending, no file to read."""
    paths = sysconfig.get_paths()
    if source == "stdlib":
        return Source(source, _python_files(paths["stdlib"]))
    if source == "installed":
        folders = dict.fromkeys(paths[name] for name in ("stdlib", "purelib", "platlib"))
        return Source(source, [file for folder in folders for file in _python_files(folder)])
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"{source} does not exist; give a file, a folder, stdlib or installed")
    if path.is_dir():
        return _folder(source, path)
    if ending(path) is None:
        raise UserError(f"{source}: minillm reads {' '.join(ENDINGS)}; rename it to .txt if it is plain text")
    if not path.is_file():
        raise UserError(f"{source} is neither a file nor a folder")
    if path.stat().st_size == 0:
        raise UserError(f"{source} is empty; give a file with text")
    return Source(source, [(source, path)], strict=True)


def _python_files(folder: str) -> list[tuple[str, Path]]:
    return [(name, path) for name, path in _walk(folder, _LEFT_OUT) if name.endswith(".py")]


def is_prepared(path: Path | str) -> bool:
    """Whether a folder holds shards: token files, by which it is known even where its index is lost."""
    return Path(path).is_dir() and any(Path(path).glob("*.tokens"))


def _folder(source: str, folder: Path) -> Source:
    if is_prepared(folder):
        return Source(source, [], prepared=folder)
    files = [(name, path) for name, path in _walk(folder) if ending(path) is not None]
    if not files:
        raise UserError(f"{source} holds no file that minillm reads ({' '.join(ENDINGS)})")
    return Source(source, files, root=folder.resolve())


def _walk(folder: str | Path, left_out: frozenset[str] = frozenset()) -> list[tuple[str, Path]]:
    """(name relative to `folder`, path) of each file below it, sorted by name.

    Without hidden files and folders and folders named in `left_out`; links to folders are not followed.
    """
    found = []
    for parent, folders, names in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in left_out]
        below = Path(parent).relative_to(folder)
        found += [((below / name).as_posix(), Path(parent, name)) for name in names if not name.startswith(".")]
    return sorted(found)
