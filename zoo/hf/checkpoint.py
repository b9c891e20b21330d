"""Saving and loading checkpoints: a failed save keeps the last good one, a damaged file is named."""

import contextlib
import glob
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

_SAVING = ".saving-"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@contextlib.contextmanager
def staged(folder: str | os.PathLike) -> Iterator[str]:
    """A new folder beside the files of `folder`; when the block ends well its files replace those of `folder`.

    Each file is replaced at once, and only after all are written, so a full disk or a crash while writing leaves the
    last good checkpoint. Raises OSError that says so.
    """
    target = Path(folder)
    if target.is_file():
        raise ValueError(f"{target} is a file; a checkpoint is saved to a folder")
    work = None
    try:
        target.mkdir(parents=True, exist_ok=True)
        _clear(target)
        # Inside: the same file system, so a rename suffices. The name says whose it is.
        work = tempfile.mkdtemp(prefix=f"{_SAVING}{platform.node()}-{os.getpid()}-", dir=target)
        yield work
        new = sorted(path for path in Path(work).rglob("*") if path.is_file())
        names = {path.relative_to(work) for path in new}
        for path in new:
            place = target / path.relative_to(work)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
        if any(name.suffix == ".safetensors" for name in names):
            # Weights of an earlier save with other shards would be read first.
            for old in [*target.glob("model*.safetensors"), *target.glob("model*.safetensors.index.json")]:
                if old.relative_to(target) not in names:
                    old.unlink()
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"could not save to {target}: {error}. A checkpoint that was there before is unchanged; "
            "free space, or choose another folder"
        ) from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


def _clear(target: Path) -> None:
    """Delete what processes of this machine left that were killed while saving to `target`. Those that live may be
    saving yet (every rank of a distributed run comes through here)."""
    for path in target.glob(f"{_SAVING}{glob.escape(platform.node())}-*"):
        process = path.name.rsplit("-", 2)[-2]
        if process.isdecimal() and not _lives(int(process)):
            shutil.rmtree(path, ignore_errors=True)


def _lives(process: int) -> bool:
    if os.name == "nt":
        return True  # there, signal 0 would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass  # another user's, or not a number that we wrote
    return True


def check_source(source: Any) -> None:
    """Raise FileNotFoundError or ValueError where `source` is a path and no folder of a saved model or adapter; a hub
    id passes."""
    path = Path(str(source))
    if path.is_file():
        raise ValueError(f"{source} is a file; give the folder that holds it beside config.json")
    if not path.is_dir():
        if str(source).startswith((".", "~")) or path.is_absolute() or len(path.parts) > 2:
            raise FileNotFoundError(f"there is no folder {source}; give a saved model's folder, or a hub id")
    elif not _holds_model(path):
        inner = path / "model"  # where a training run puts it
        way = f"it is in {inner}" if _holds_model(inner) else "give one that save_pretrained wrote"
        raise ValueError(f"the folder {source} holds no saved model (no config.json); {way}")


def _holds_model(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", "adapter_config.json"))


def refuse_pickle(source: Any, options: dict[str, Any]) -> None:
    """Raise ValueError where weights would be read from pickle files, which can run any code when loaded."""
    if options.get("use_safetensors") is False:
        raise ValueError(
            f"{source}: use_safetensors=False would read pickled weights, which can run any code; leave it out"
        )
    folder = Path(str(source)) / options.get("subfolder", "")
    if (
        not folder.is_dir()
        or any(folder.glob("*.safetensors"))
        or options.get("gguf_file")
        or options.get("state_dict")
    ):
        return
    pickles = [path.name for pattern in _PICKLES for path in sorted(folder.glob(pattern))]
    if pickles:
        raise ValueError(
            f"{folder} holds pickled weights only ({', '.join(pickles)}), which can run any code when loaded; "
            "load them where you trust them and save them with save_pretrained, which writes safetensors"
        )


def damaged(source: Any, error: Exception) -> ValueError:
    """The error for weights that safetensors cannot read: names the file if it is on this disk."""
    bad = []
    for path in sorted(Path(str(source)).rglob("*.safetensors")) if Path(str(source)).is_dir() else []:
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except (SafetensorError, OSError):
            bad.append(f"{path} ({path.stat().st_size} bytes)")
    what = ", ".join(bad) if bad else str(source)
    return ValueError(
        f"{what} is damaged or only partly written: {error}. "
        "Copy or download the checkpoint again, or load an earlier one"
    )
