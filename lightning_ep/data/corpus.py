"""Text files, a tokenizer of them, and a cache of what is made of them: the steps behind ``TextDataModule``."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lightning_ep.data.standard_library import standard_library, walk

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def find_files(source: str) -> list[Path]:
    """List the text files of a source, sorted by path.

    Args:
        source: ``"stdlib"`` for the source files of the running Python's standard library, a directory (every file
            below it, except hidden ones), one file, or a glob pattern (``**`` descends).

    Raises:
        FileNotFoundError: If nothing is there.
    """
    if source == "stdlib":
        files = standard_library()
    elif Path(source).expanduser().is_dir():
        files = list(walk(Path(source).expanduser(), lambda name: name.startswith(".")))
    else:
        files = [Path(path) for path in glob.glob(str(Path(source).expanduser()), recursive=True)]
    files = sorted(path for path in files if path.is_file())
    if not files:
        raise FileNotFoundError(
            f"source={source!r} has no text files. Give 'stdlib', a directory, a file or a glob pattern such as"
            " 'corpus/**/*.txt' (quoted, so that the shell leaves it alone)."
        )
    return files


def read_text(path: Path, characters: int = -1) -> str:
    """Read a UTF-8 text file, or so many characters of its beginning.

    Raises:
        ValueError: If it is not UTF-8.
    """
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(characters)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error}). Convert it, or leave it out with a pattern such as 'corpus/**/*.txt'."
        ) from error


def split_files(files: Sequence[Path], validation_fraction: float, seed: int) -> tuple[list[Path], list[Path]]:
    """Split files into training and validation so that validation holds about ``validation_fraction`` of the bytes.

    No file is in both, so near-identical passages of one file cannot leak.

    Raises:
        ValueError: If the fraction is not between 0 and 1, or there are fewer than two files.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction={validation_fraction} must lie between 0 and 1, for example 0.05.")
    if len(files) < 2:
        raise ValueError(
            f"The source has one file ({files[0]}), but training and validation are split by file and need one each. "
            "Cut it into several, for example with `split -C 1m`."
        )
    order = np.random.default_rng(seed).permutation(len(files))
    sizes = np.array([files[i].stat().st_size for i in order])
    # the smallest number of files that reaches the fraction, but never all of them
    count = int(np.searchsorted(np.cumsum(sizes), validation_fraction * sizes.sum())) + 1
    count = min(count, len(files) - 1)
    return [files[i] for i in sorted(order[count:])], [files[i] for i in sorted(order[:count])]


def fingerprint(files: Sequence[Path], *settings: object) -> str:
    """Hash names and contents of files and any settings to 16 hexadecimal digits."""
    digest = hashlib.sha256(repr(settings).encode())
    for path in files:
        digest.update(str(path).encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (Sennrich et al., 2016, on bytes as in GPT-2): no text is ever unknown to it.

    Its one special token, ``<|endoftext|>``, ends documents and pads. Small texts give fewer than ``vocab_size``
    tokens.

    Raises:
        ValueError: If ``vocab_size`` is too small for the 256 bytes and the end-of-text token.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size} must be at least 257: the 256 bytes and {END_OF_TEXT}.")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def build_once(target: Path, build: Callable[[Path], None]) -> None:
    """Fill a new directory with ``build(directory)`` and give it the name ``target``, unless ``target`` exists.

    The rename is atomic, so readers see all of it or nothing. Processes that race build the same contents; the first
    wins.
    """
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        build(scratch)
        scratch.chmod(0o777 & ~_umask())  # mkdtemp makes directories that nobody else can read
        try:
            os.rename(scratch, target)
        except OSError:
            if not target.exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
