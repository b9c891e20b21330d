"""Documents encoded once into flat arrays on disk, opened as memory maps: the second start reads nothing.

A corpus is a folder: tokens.npy, sizes.npy (bytes of text each token stands for), starts.npy (where each document
begins, and the end), about.json (source, counts, the SHA-256 of names and contents).
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train.data.documents import Document, Source, share
from train.data.tokenizer import Tokenizer

LAYOUT = 1  # raise when the files or their meaning change


class Corpus(NamedTuple):
    tokens: np.ndarray  # [tokens], the smallest unsigned type that holds the vocabulary
    sizes: np.ndarray  # [tokens] uint16
    starts: np.ndarray  # [documents + 1] int64
    about: dict[str, Any]


class Writer:
    """Collects one half of a source."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.tokens: list[np.ndarray] = []
        self.sizes: list[np.ndarray] = []
        self.starts = [0]
        self.bytes = 0
        self.hash = hashlib.sha256()

    def add(self, document: Document) -> None:
        ids, sizes = self.tokenizer.encode(document.text, document.name)
        if self.tokenizer.end is not None:
            ids = np.append(ids, np.uint32(self.tokenizer.end))
            sizes = np.append(sizes, np.uint16(0))
        self.tokens.append(ids.astype(np.min_scalar_type(self.tokenizer.vocab_size - 1)))
        self.sizes.append(sizes)
        self.starts.append(self.starts[-1] + len(ids))
        self.bytes += len(document.text)
        self.hash.update(f"{document.name}\0{len(document.text)}\0".encode() + document.text)

    def write(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True)
        np.save(folder / "tokens.npy", np.concatenate(self.tokens))
        np.save(folder / "sizes.npy", np.concatenate(self.sizes))
        np.save(folder / "starts.npy", np.asarray(self.starts, np.int64))
        about = {
            "source": name,
            "tokenizer": self.tokenizer.name,
            "documents": len(self.starts) - 1,
            "bytes": self.bytes,
            "tokens": self.starts[-1],
            "sha256": self.hash.hexdigest(),
        }
        (folder / "about.json").write_text(json.dumps(about, indent=2))


def halves(documents: Iterable[Document], validation_share: float) -> tuple[list[Document], list[Document]]:
    """Split by document: training, validation. No document is in both, and neither half is empty: with few documents
    the one whose hash is lowest validates; a lone document gives its tail, from a line's start."""
    found = list(documents)
    if validation_share == 0:
        return found, []
    training = [each for each in found if share(each.name) >= validation_share]
    validation = [each for each in found if share(each.name) < validation_share]
    if len(found) == 1:
        name, text = found[0]
        cut = text.rfind(b"\n", 0, max(1, int(len(text) * (1 - validation_share)))) + 1
        cut = cut or int(len(text) * (1 - validation_share))
        return [Document(name, text[:cut])], [Document(name, text[cut:])]
    if not validation or not training:
        found.sort(key=lambda each: share(each.name))
        return found[1:], found[:1]
    return training, validation


def count(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each id stands in `tokens`: [vocab] int64. Reads a memory map a piece at a time."""
    piece = 2**24
    pieces = (tokens[start : start + piece] for start in range(0, len(tokens), piece))
    return sum((np.bincount(each, minlength=vocab_size) for each in pieces), np.zeros(vocab_size, np.int64))


def cache_folder(chosen: str | None) -> Path:
    """`chosen`, else $ZOO_CACHE, else the user's cache folder."""
    if chosen or os.environ.get("ZOO_CACHE"):
        return Path(chosen or os.environ["ZOO_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "efficient-zoo" / "corpora"


def build(source: Source, tokenizer: Tokenizer, validation_share: float, cache: Path) -> Path:
    """Encode `source` into two corpora, `training` and `validation` (absent when the share is 0), unless they are
    there. Returns their folder. It appears whole by a rename, so a killed build or two at once leave no half of one.
    """
    made_by = [tokenizer.identity, tokenizer.vocab_size]
    key = json.dumps([LAYOUT, source.name, source.fingerprint, *made_by, validation_share])
    folder = cache / f"{Path(source.name).name[:40]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if folder.exists():
        return folder
    building = None
    try:
        cache.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=cache))
        for name, half in zip(("training", "validation"), halves(source.documents, validation_share), strict=True):
            writer = Writer(tokenizer)
            for document in half:
                writer.add(document)
            if half:
                writer.write(building / name, source.name)
        building.rename(folder)
    except OSError as error:
        if not folder.exists():  # else another process built it first
            raise OSError(
                error.errno,
                f"cannot write the encoded text to {cache} ({error.strerror}); free space there or choose "
                "another folder with data.cache",
            ) from error
    finally:
        if building is not None:
            shutil.rmtree(building, ignore_errors=True)
    return folder


def open_corpus(folder: Path) -> Corpus:
    """Open one half. Costs a few memory maps, however large it is."""
    try:
        about = json.loads((folder / "about.json").read_text())
        names = ("tokens", "sizes", "starts")
        tokens, sizes, starts = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in names)
        if not len(tokens) == len(sizes) == starts[-1] == about["tokens"]:
            raise ValueError("its files do not belong together")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"the encoded text in {folder} is damaged ({error}); delete that folder, it is made again"
        ) from error
    return Corpus(tokens, sizes, starts, about)
