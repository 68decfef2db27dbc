"""Files of checkpoints: written with a checksum, published all at once, verified by name. Knows no process group."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import time
import uuid
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_ep.hub.durable import sync

MANIFEST = "manifest.json"
META = "meta.pt"
FORMAT = 1

# A hidden name does not contain the checkpoint's: Lightning searches directories for names with "ckpt_" in them.
_HIDDEN = ".lightning_ep-"
_STALE_SECONDS = 24 * 3600
_CHUNK = 1 << 22


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says of a file.

    Attributes:
        bytes: Its size.
        crc32: Its CRC-32 (zlib).
    """

    bytes: int
    crc32: int


class ChecksumFile(io.RawIOBase):
    """A new file to write to, which knows size and checksum of what went through it; `close` makes it durable."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "xb", buffering=1 << 20)  # noqa: SIM115
        self._bytes = 0
        self._crc32 = 0

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, data: Any) -> int:
        """Appends bytes."""
        view = memoryview(data).cast("B")
        self._file.write(view)
        self._crc32 = zlib.crc32(view, self._crc32)
        self._bytes += len(view)
        return len(view)

    def tell(self) -> int:
        """Bytes so far."""
        return self._bytes

    @property
    def record(self) -> FileRecord:
        """Size and checksum so far."""
        return FileRecord(self._bytes, self._crc32)

    def close(self) -> None:
        """Writes what is buffered through to the disk."""
        if self.closed:
            return
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()
            super().close()


def write_file(path: Path, data: bytes) -> FileRecord:
    """Writes a new file durably."""
    with ChecksumFile(path) as file:
        file.write(data)
    return file.record


def checksum(path: Path) -> FileRecord:
    """Reads a file for its size and checksum."""
    crc32, size, buffer = 0, 0, memoryview(bytearray(_CHUNK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            crc32 = zlib.crc32(buffer[:count], crc32)
            size += count
    return FileRecord(size, crc32)


# ---------------------------------------------------------------------------------------------------- the manifest


def write_manifest(directory: Path, records: Mapping[str, FileRecord]) -> None:
    """Writes the list of files, which makes a directory a checkpoint.

    Raises:
        FileNotFoundError: If a file that another rank wrote cannot be seen from here.
    """
    for name, record in records.items():
        found = (directory / name).stat().st_size if (directory / name).exists() else None
        if found != record.bytes:
            raise FileNotFoundError(
                f"{directory / name} has {found} bytes here, and the rank that wrote it says {record.bytes}. All ranks "
                "must see the same directory: put checkpoints on a file system that all nodes share."
            )
    files = {name: asdict(record) for name, record in sorted(records.items())}
    manifest = {"format": FORMAT, "crc32": _crc32_of(files), "files": files}
    write_file(directory / MANIFEST, json.dumps(manifest, indent=1).encode())
    sync(directory)


def read_manifest(directory: Path) -> dict[str, FileRecord]:
    """Returns the files that a checkpoint must have.

    Raises:
        FileNotFoundError: If there is no manifest.
        ValueError: If it is damaged or of a newer format.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing, so {directory} is no complete checkpoint of lightning_ep. Use another checkpoint."
        )
    try:
        manifest = json.loads(path.read_bytes())
        files, expected, version = manifest["files"], manifest["crc32"], manifest["format"]
        damaged = _crc32_of(files) != expected
    except (ValueError, KeyError, TypeError):
        damaged, files, version = True, {}, FORMAT
    if version > FORMAT:
        raise ValueError(
            f"{path} has format {version}, and this version of lightning_ep reads up to {FORMAT}: upgrade."
        )
    if damaged:
        raise ValueError(f"{path} is damaged. Use another checkpoint.")
    return {name: FileRecord(**record) for name, record in files.items()}


def _crc32_of(files: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(files, sort_keys=True).encode())


def damage(directory: Path, records: Mapping[str, FileRecord], threads: int = 4) -> list[str]:
    """Reads files in full and says what is wrong with each that is not as its record says."""
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda item: _compare(directory / item[0], item[1]), records.items())
    return [problem for problem in found if problem is not None]


def _compare(path: Path, expected: FileRecord) -> str | None:
    try:
        found = checksum(path)
    except FileNotFoundError:
        return f"{path} is missing"
    if found.bytes != expected.bytes:
        return f"{path} has {found.bytes} bytes instead of {expected.bytes}"
    if found.crc32 != expected.crc32:
        return f"{path} has the checksum {found.crc32:08x} instead of {expected.crc32:08x}"
    return None


# ---------------------------------------------------------------------------------------------------- names


def local_path(path: str | Path) -> Path:
    """Returns ``path`` as one of this machine's file systems.

    Raises:
        ValueError: If it is the address of something else.
    """
    if re.match(r"[A-Za-z][\w+.-]+:/", str(path)):
        raise ValueError(
            f"{path} is no path of a file system. Checkpoints need one that all nodes have mounted: mount the storage, "
            "or save locally and copy afterwards."
        )
    return Path(path)


def hidden(final: Path) -> Path:
    """A fresh name beside ``final`` that no search for checkpoints finds."""
    return final.with_name(f"{_HIDDEN}{_key(final)}-{uuid.uuid4().hex[:12]}")


def _key(final: Path) -> str:
    return f"{zlib.crc32(final.name.encode()):08x}"


def remove_leftovers(final: Path) -> None:
    """Deletes what killed saves left: all of this name, and of other names what is older than a day."""
    for path in final.parent.iterdir():
        if path.name.startswith(_HIDDEN):
            same = path.name.startswith(f"{_HIDDEN}{_key(final)}-")
            with contextlib.suppress(OSError):  # another job tidies up too, or another user's job was killed
                if same or time.time() - path.lstat().st_mtime > _STALE_SECONDS:
                    delete(path)


def delete(path: Path) -> None:
    """Deletes a file, link or directory, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def refuse_foreign_directory(path: Path) -> None:
    """Raises FileExistsError if saving to ``path`` would replace a directory that is no checkpoint."""
    if path.is_symlink() or not path.is_dir():
        return
    names = {entry.name for entry in path.iterdir()}
    if names and not names & {MANIFEST, META}:
        raise FileExistsError(
            f"{path} is a directory with other things in it ({', '.join(sorted(names)[:3])}), and a checkpoint would "
            "take its place. Choose a name inside it, or another."
        )


def publish(staged: Path, final: Path) -> None:
    """Gives a complete file or directory its name, whatever has that name now, which is deleted afterwards.

    A file takes the place of another in one atomic step. A directory cannot: what it replaces first gets a visible name
    of its own, which `find` knows, so that at no moment neither is there. Links to it lead to one of the two at every
    moment: Lightning takes a link that leads nowhere for no checkpoint, and ``ckpt_path="last"`` would start anew.

    Args:
        staged: A durable file or directory beside ``final``.
        final: The name.
    """
    if os.path.lexists(final) and (_is_directory(staged) or _is_directory(final)):
        links = links_to(final)
        if links:
            staged = staged.rename(_replaced(final))  # no longer hidden, since the next save deletes what is
        _lead(links, staged)
        replaced = _replaced(final)
        os.rename(final, replaced)
        _lead(links, replaced)  # while what is new has no name that stays
        os.rename(staged, final)
    else:
        os.replace(staged, final)
    sync(final.parent)
    for old in _replacements(final):  # also what jobs have left that ended here, with or without a `final`
        _lead(links_to(old), final)
        withdraw(old)


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()  # a link to a directory can be replaced in one step


def _replaced(final: Path) -> Path:
    return final.with_name(f"{final.stem}.replaced-{uuid.uuid4().hex[:12]}{final.suffix}")


def _replacements(path: Path) -> list[Path]:
    siblings: Iterable[Path] = path.parent.iterdir() if path.parent.is_dir() else ()
    # Not by `suffix`, which is that of the fresh part for names without one.
    name = re.compile(rf"{re.escape(path.stem)}\.replaced-\w+{re.escape(path.suffix)}")
    return [sibling for sibling in siblings if name.fullmatch(sibling.name)]


def _lead(links: Iterable[Path], target: Path) -> None:
    for link in links:
        point(link, target)


def withdraw(path: Path) -> None:
    """Deletes a checkpoint so that it is there in full or not at all: its name goes first."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    elif path.exists():
        doomed = hidden(path)
        os.rename(path, doomed)
        sync(path.parent)
        delete(doomed)


def links_to(target: Path) -> list[Path]:
    """Symbolic links beside ``target`` that point to it."""
    if not target.parent.is_dir():
        return []
    return [path for path in target.parent.iterdir() if path.is_symlink() and _destination(path) == target.absolute()]


def _destination(link: Path) -> Path:
    return Path(os.path.normpath(link.absolute().parent / os.readlink(link)))


def point(link: Path, target: Path) -> None:
    """Lets ``link`` point to ``target``, in one atomic step, whatever it was before."""
    if link.absolute() == target.absolute():
        return
    fresh = hidden(link)
    os.symlink(os.path.relpath(target, link.parent), fresh)
    publish(fresh, link)


def find(path: Path) -> Path:
    """Returns ``path``, or what a replacement that was interrupted has left of it under another name.

    Raises:
        FileNotFoundError: If there is neither.
    """
    if path.exists():
        return path
    if replaced := _replacements(path):
        return max(replaced, key=lambda p: p.stat().st_mtime)
    if path.is_symlink():
        raise FileNotFoundError(f"{path} points to {os.readlink(path)}, which does not exist. Use another checkpoint.")
    raise FileNotFoundError(f"There is no checkpoint {path}.")
