"""Text to token ids, and how many bytes of text each token stands for (bits per byte needs them)."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, UInt16, UInt32


class Encoded(NamedTuple):
    """One document: its ids, and the bytes of text each id stands for. The sizes add up to the document's bytes."""

    ids: UInt32[np.ndarray, " tokens"]
    sizes: UInt16[np.ndarray, " tokens"]


class Tokenizer(Protocol):
    """What the data side asks of a tokenizer."""

    @property
    def name(self) -> str: ...  # names the tokenizer in the run's record

    @property
    def identity(self) -> str: ...  # in the cache's key: another one for another tokenizer, under the same name too

    @property
    def vocab_size(self) -> int: ...

    @property
    def end(self) -> int | None: ...  # id that closes a document, None if the tokenizer has none

    @property
    def mask(self) -> int | None: ...  # id that hides a token from a masked model; it may lie behind vocab_size

    @property
    def special(self) -> list[int]: ...  # ids that are no text

    def encode(self, text: bytes, name: str) -> Encoded: ...

    def joins(self) -> Bool[np.ndarray, "2 ids"]: ...  # of each id: goes on a word; leaves its word open


class Bytes:
    """The 256 bytes as tokens. Byte 0 closes a document: files with it are binary and refused before.
    Masked models have one token more, which hides a byte."""

    name = identity = "bytes"
    vocab_size = 256
    end = 0
    mask = 256
    special = [0]  # noqa: RUF012 (read only)

    def encode(self, text: bytes, name: str) -> Encoded:
        ids = np.frombuffer(text, np.uint8).astype(np.uint32)
        return Encoded(ids, np.ones(len(ids), np.uint16))

    def joins(self) -> Bool[np.ndarray, "2 ids"]:
        """Letters, digits, the underscore and the bytes of characters beyond ASCII make words."""
        found = [chr(byte).isalnum() or byte == ord("_") if byte < 128 else True for byte in range(256)]
        return np.asarray([found, found])


class HuggingFace:
    """Any Hugging Face tokenizer, by folder or hub id."""

    def __init__(self, name: str):
        from zoo.hf import load_tokenizer as load

        try:
            self.tokenizer: Any = load(name)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"tokenizer={name!r} could not be loaded ({str(error).splitlines()[0]}); give 'bytes', the folder of a "
                "saved Hugging Face tokenizer, or a hub id this machine can reach"
            ) from error
        self.name = name
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        self.identity = name if backend is None else hashlib.sha256(backend.to_str().encode()).hexdigest()
        self.vocab_size = len(self.tokenizer)
        self.end = self.tokenizer.eos_token_id
        self.mask = self.tokenizer.mask_token_id
        self.special = self.tokenizer.all_special_ids

    def encode(self, text: bytes, name: str) -> Encoded:
        try:
            characters = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name} is not UTF-8 (byte {error.start}); convert it, or train on bytes with tokenizer='bytes'"
            ) from error
        fast = getattr(self.tokenizer, "is_fast", False)
        out = self.tokenizer(characters, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
        ids = np.asarray(out["input_ids"], np.uint32)
        ends = _ends(characters, out["offset_mapping"]) if fast else np.linspace(0, len(text), len(ids) + 1)[1:]
        # Text after the last token (a tokenizer that strips it) counts to the last token, so that sizes add up.
        ends = np.append(ends[:-1], len(text)).astype(np.int64) if len(ids) else np.empty(0, np.int64)
        sizes = np.diff(ends, prepend=0)
        return Encoded(ids, np.minimum(sizes, np.iinfo(np.uint16).max).astype(np.uint16))

    def joins(self) -> Bool[np.ndarray, "2 ids"]:
        """By how tokens are written: WordPiece marks what goes on a word, others what begins or ends one."""
        pieces = [piece or "" for piece in self.tokenizer.convert_ids_to_tokens(list(range(self.vocab_size)))]
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None and type(backend.model).__name__ == "WordPiece":
            return np.asarray([[piece.startswith("##") for piece in pieces], [True] * len(pieces)])
        found = [_joins(piece, self.tokenizer.decode([index])) for index, piece in enumerate(pieces)]
        return np.asarray(found).T


def own_tokenizer(model: str) -> str:
    """What `load_tokenizer` takes for a saved model's own tokenizer. Raises ValueError where none is beside it."""
    from zoo.hf import byte_tokenizer
    from zoo.hf import load_tokenizer as load

    try:
        vocabulary = load(model).get_vocab()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"beside the model {model!r} lies no tokenizer that can be read ({str(error).splitlines()[0]}); set "
            "data.tokenizer to 'bytes', the folder of a saved Hugging Face tokenizer, or a hub id"
        ) from error
    return "bytes" if any(vocabulary == byte_tokenizer(mask).get_vocab() for mask in (False, True)) else model


def _joins(piece: str, text: str) -> tuple[bool, bool]:
    """Whether a token begins inside a word, and whether it ends inside one."""
    # Decoding drops SentencePiece's mark of a word's begin; of a part of a character it makes U+FFFD.
    text = piece if "\u2581" in piece else text
    begin, end = (each.isalnum() or each in ("_", "\ufffd") for each in (text[:1], text[-1:]))
    return begin, end and not piece.endswith("</w>")


def _ends(characters: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """Where each token ends, in bytes. Characters that several tokens share count once, to the first of them."""
    lengths = np.fromiter((len(each.encode()) for each in characters), np.int64, len(characters))
    position = np.concatenate([[0], lengths.cumsum()])
    last = np.asarray([end for _, end in offsets], np.int64)
    return position[np.maximum.accumulate(last)] if len(last) else np.empty(0, np.int64)


def load_tokenizer(name: str) -> Tokenizer:
    """`"bytes"`, or a Hugging Face tokenizer by folder or hub id."""
    if name == "bytes":
        return Bytes()
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().exists():
        raise FileNotFoundError(f"tokenizer={name!r} does not exist; give 'bytes', a tokenizer's folder or a hub id")
    return HuggingFace(str(Path(name).expanduser()) if name.startswith("~") else name)
