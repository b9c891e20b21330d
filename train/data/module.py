"""The data side as Lightning sees it: one typed configuration, two loaders."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import lightning
import numpy as np
from torch.utils.data import DataLoader

from train.data.corpus import build, cache_folder, count, open_corpus
from train.data.documents import DATASET, Document, Rows, Source, open_dataset, open_source, share
from train.data.loader import ResumableLoader
from train.data.stream import Stream
from train.data.tokenizer import load_tokenizer
from train.data.windows import Order, ValidationOrder, Windows

COUNTED = 2**20  # tokens of a stream from which the tokens' frequencies are known


class TextData(lightning.LightningDataModule):
    """Text as windows of `length` tokens, split into training and validation by document.

    Args:
        source: "stdlib" (the Python standard library's own source), a text file, a folder of text files, or
            "dataset:NAME" for a `datasets` dataset from the hub or a folder.
        validation: another source to validate on; null holds out `validation_share` of the documents.
        validation_share: share of the documents held out, chosen by a hash of their names.
        tokenizer: "bytes", or a Hugging Face tokenizer's folder or hub id; null: the saved model's own, bytes for a new
            model.
        length: tokens a window (the model reads `length` tokens and predicts as many).
        batch_size: windows a step in each process.
        documents: "pack": documents in one window do not see each other (`segments`); "stream": one long text.
        passes: passes over the text; null: as many as trainer.max_steps takes.
        workers: processes that prepare batches.
        seed: of the order of the windows.
        pattern: which files of a folder, e.g. "*.txt".
        subset: the dataset's configuration name.
        split: the dataset's split to train on.
        validation_split: the dataset's split to validate on; null holds out `validation_share`.
        field: the dataset's column of text.
        streaming: read the dataset as a stream and store nothing but the validation documents.
        shuffle_buffer: windows among which a stream is shuffled.
        validation_documents: how many documents of a stream are held out.
        cache: folder of encoded texts; null: $ZOO_CACHE, or the user's cache folder.
    """

    def __init__(
        self,
        source: str = "stdlib",
        *,
        validation: str | None = None,
        validation_share: float = 0.05,
        tokenizer: str | None = None,
        length: int = 512,
        batch_size: int = 8,
        documents: Literal["pack", "stream"] = "pack",
        passes: int | None = None,
        workers: int = 0,
        seed: int = 0,
        pattern: str = "*",
        subset: str | None = None,
        split: str = "train",
        validation_split: str | None = None,
        field: str = "text",
        streaming: bool = False,
        shuffle_buffer: int = 256,
        validation_documents: int = 200,
        cache: str | None = None,
    ):
        super().__init__()
        for name, value in {"length": length, "batch_size": batch_size, "passes": passes}.items():
            if value is not None and value < 1:
                raise ValueError(f"data.{name}={value} must be at least 1")
        if not 0 < validation_share < 1:
            raise ValueError(f"data.validation_share={validation_share} must lie between 0 and 1, e.g. 0.05")
        if streaming and not source.startswith(DATASET):
            raise ValueError(f"data.streaming reads a dataset, but data.source={source!r}; write '{DATASET}NAME'")
        if validation_split is not None and not source.startswith(DATASET):
            raise ValueError(f"data.validation_split={validation_split!r} is for a dataset, not for source={source!r}")
        self.source, self.validation, self.validation_share = source, validation, validation_share
        self.length, self.batch_size, self.packed, self.passes = length, batch_size, documents == "pack", passes
        self.workers, self.seed, self.pattern, self.subset = workers, seed, pattern, subset
        self.split, self.validation_split, self.field = split, validation_split, field
        self.streaming, self.shuffle_buffer, self.validation_documents = streaming, shuffle_buffer, validation_documents
        self.tokenizer_name, self.cache = tokenizer, cache_folder(cache)
        self.training: Windows | None = None

    # What is where --------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Encode what is not encoded yet (one process does, the others wait)."""
        self._folders()

    def _folders(self) -> tuple[Path | None, Path]:
        """The encoded training text (None for a stream) and the encoded validation text."""
        share = 0.0 if self.validation or self.validation_split else self.validation_share
        training = None
        if not self.streaming:
            found = build(self._source(self.source, self.split), self.tokenizer, share, self.cache)
            training, held_out = found / "training", found / "validation"
            if share:
                return training, held_out
        if self.validation or self.validation_split:
            source = self._source(self.validation or self.source, self.validation_split or self.split)
        else:
            source = self._held_out()
        return training, build(source, self.tokenizer, 0.0, self.cache) / "training"

    def _source(self, source: str, split: str) -> Source:
        return open_source(source, pattern=self.pattern, subset=self.subset, split=split, field=self.field)

    def _open_stream(self) -> Any:
        return open_dataset(self.source, subset=self.subset, split=self.split, field=self.field, streaming=True)

    def _held_out(self) -> Source:
        """The first documents of a stream that are not trained on, as a source."""

        def documents() -> Iterator[Document]:
            rows = Rows(self._open_stream(), self.field)
            chosen = (each for each in rows if share(each.name) < self.validation_share)
            yield from islice(chosen, self.validation_documents)

        found = list(documents())
        if not found:
            raise ValueError(
                f"data.source={self.source!r} yielded no document to hold out; raise data.validation_share "
                f"(now {self.validation_share}) or name a data.validation_split"
            )
        fingerprint = f"{self.subset}/{self.split}/{self.validation_share}/{[each.name for each in found]}"
        return Source(f"{self.source} (held out)", fingerprint, found)

    def counts(self) -> np.ndarray:
        """How often each token stands in the training text, [vocab]; of a stream, in its first 2^20 tokens or so."""
        size = self.tokenizer.vocab_size
        if self.training is not None:
            return count(self.training.corpus.tokens, size)
        held_out = 0.0 if self.validation or self.validation_split else self.validation_share
        found = np.zeros(size, np.int64)
        for document in Rows(self._open_stream(), self.field):
            if share(document.name) >= held_out:
                found += count(self.tokenizer.encode(document.text, document.name).ids, size)
            if found.sum() >= COUNTED:
                break
        return found

    # Lightning's hooks ----------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        if not hasattr(self, "_tokenizer"):
            self._tokenizer = load_tokenizer(self.tokenizer_name or "bytes")
        return self._tokenizer

    def setup(self, stage: str) -> None:
        training, validation = self._folders()
        self.held_out = Windows(open_corpus(validation), self.length, self.packed)
        about = {"validation": self.held_out.corpus.about}
        if training is not None:
            self.training = Windows(open_corpus(training), self.length, self.packed)
            about["training"] = self.training.corpus.about
        trainer = self.trainer
        if trainer is not None and trainer.is_global_zero and stage == "fit":
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "data.json").write_text(json.dumps(about, indent=2))

    def train_dataloader(self) -> ResumableLoader:
        rank, ranks = self._place()
        if self.training is not None:
            order = Order(len(self.training), self.passes, self.seed, rank, ranks)
            return ResumableLoader(
                self.training, self.batch_size, sampler=order, num_workers=self.workers, drop_last=True
            )
        from datasets.distributed import split_dataset_by_node

        rows = split_dataset_by_node(self._open_stream(), rank, ranks)
        stream = Stream(
            rows,
            self.field,
            self.tokenizer,
            self.length,
            packed=self.packed,
            held_out=0.0 if self.validation or self.validation_split else self.validation_share,
            passes=self.passes,
            buffer=self.shuffle_buffer,
            seed=self.seed,
        )
        # A worker's state holds the buffer: sending it with every batch would cost more than the batch.
        return ResumableLoader(
            stream, self.batch_size, num_workers=self.workers, drop_last=True, snapshot_every_n_steps=50
        )

    def val_dataloader(self) -> DataLoader[Any]:
        rank, ranks = self._place()
        order = ValidationOrder(len(self.held_out), rank, ranks)
        return DataLoader(self.held_out, self.batch_size, sampler=order)

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
