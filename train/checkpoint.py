"""Checkpoints that are there whole or not at all, and a Hugging Face export beside each."""

import contextlib
import copy
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from train.data.tokenizer import Bytes
from train.module import LanguageModule


def checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    found = [(int(m[1]), each) for each in folder.glob("step-*.ckpt") if (m := re.fullmatch(r"step-(\d+)", each.stem))]
    return [each for _, each in sorted(found)]


@contextlib.contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what is written there takes `path`'s place in one rename at the end, or
    is deleted when anything fails. The error of a failed write names the last checkpoint that is whole."""
    temporary = path.with_name(f".writing-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)  # of a process that was killed while writing
        yield temporary
        old = path.with_name(f".old-{path.name}")
        if temporary.is_dir() and path.exists():  # a folder cannot be renamed onto a full one
            remove(old)
            os.replace(path, old)
        os.replace(temporary, path)
        remove(old)
    except Exception as error:
        with contextlib.suppress(OSError):
            remove(temporary)
        good = checkpoints(path.parent)
        left = f"the last good checkpoint is {good[-1]}: resume with --ckpt_path" if good else "no other is there yet"
        number = error.errno if isinstance(error, OSError) else None
        why, remedy = str(error), "Check that the folder can be written"
        if number == errno.ENOSPC or re.search("no space left|os error 28|errno 28", why, re.IGNORECASE):
            number, why, remedy = errno.ENOSPC, "no space is left on the disk", "Free some space"
        raise OSError(number or errno.EIO, f"could not write {path}: {why}. {remedy}; {left}") from error


def remove(path: Path) -> None:
    """Delete a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes by rename, and reads nothing but tensors and plain data (`weights_only`)."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomically(Path(path)) as temporary, open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())  # a rename may reach the disk before the data does

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        return read(Path(path))


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's content. Raises FileNotFoundError, or ValueError with the way out for a damaged one."""
    if not path.exists():
        others = ", ".join(each.name for each in checkpoints(path.parent)) or "no checkpoints"
        raise FileNotFoundError(f"there is no checkpoint {path}; {path.parent} holds {others}")
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder; resume from a file such as checkpoints/step-1000.ckpt with --ckpt_path, or train on "
            "from an exported model with `zoo finetune --from`"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken zip, a truncated tensor and a forbidden pickle raise many types
        good = [each for each in checkpoints(path.parent) if each != path]
        way = f"resume from {good[-1]} with --ckpt_path" if good else "there is no other one here: start the run anew"
        raise ValueError(
            f"the checkpoint {path} is damaged or only partly written ({path.stat().st_size} bytes; "
            f"{f'{type(error).__name__}: {error}'.splitlines()[0]}); {way}"
        ) from error


class Checkpoints(ModelCheckpoint):
    """A checkpoint to resume from every `every` steps and at the end, as `checkpoints/step-N.ckpt` in the run's
    folder; the last `keep` stay. Beside each the model as a Hugging Face folder `step-N` (safetensors).
    """

    def __init__(self, every: int = 1000, keep: int = 2):
        if every < 1 or keep < 1:
            raise ValueError(f"every={every} and keep={keep} must be at least 1")
        super().__init__(
            filename="step-{step}",
            auto_insert_metric_name=False,
            monitor="step",
            mode="max",
            save_top_k=keep,
            every_n_train_steps=every,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def _ModelCheckpoint__warn_if_dir_not_empty(self, dirpath: Any) -> None:
        """A resumed run goes on in its folder; that is no reason to warn."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Between two optimizer steps the accumulated gradients would be lost.
        if not trainer.fit_loop._should_accumulate():
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Count the checkpoints that are there, whatever the one resumed from remembers."""
        super().on_train_start(trainer, pl_module)
        there = {each: int(each.stem.removeprefix("step-")) for each in checkpoints(Path(str(self.dirpath)))}
        kept = [each for each, step in there.items() if step <= trainer.global_step][-self.save_top_k :]
        self.best_k_models = {str(each): torch.tensor(there[each]) for each in kept}
        if kept:
            self.kth_best_model_path, self.kth_value = str(kept[0]), torch.tensor(there[kept[0]])
            self.best_model_path, self.best_model_score = str(kept[-1]), torch.tensor(there[kept[-1]])

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Save the end of the run too, and name its export `model` in the run's folder."""
        if trainer.fast_dev_run:
            return
        if trainer.global_step != self._last_global_step_saved:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        export(trainer, Path(trainer.default_root_dir) / "model")

    def _should_remove_checkpoint(self, trainer: Any, previous: str, current: str) -> bool:
        """Lightning would keep the one resumed from for ever; newer ones are as good."""
        return previous != current

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        export(trainer, Path(filepath).with_suffix(""))

    def _remove_checkpoint(self, trainer: Any, filepath: str) -> None:
        super()._remove_checkpoint(trainer, filepath)
        if trainer.is_global_zero:
            remove(Path(filepath).with_suffix(""))


def export(trainer: Any, folder: Path) -> None:
    """Save the model as a Hugging Face folder, the tokenizer beside it. Every rank calls; rank 0 writes, and the others
    wait for it: one that ended earlier could close its connections while rank 0 still reads what it sent."""
    state = gather(trainer)
    if trainer.is_global_zero:
        _write(trainer, folder, state)
    trainer.strategy.barrier("export")


def _write(trainer: Any, folder: Path, state: dict[str, Tensor]) -> None:
    from zoo.hf import hide_progress, save_byte_tokenizer

    module: LanguageModule = trainer.lightning_module
    hide_progress()  # one bar on the screen is enough
    tokenizer = getattr(trainer.datamodule, "tokenizer", None)
    with atomically(folder) as temporary:
        if module.adapters is None:
            whole_model(module, state, tokenizer).save_pretrained(temporary)
        else:
            temporary.mkdir()
            module.adapters.save(temporary, state)
        if isinstance(tokenizer, Bytes):
            save_byte_tokenizer(temporary, mask=module.network.config.objective == "masked")
        elif tokenizer is not None:
            tokenizer.tokenizer.save_pretrained(temporary)


def whole_model(module: LanguageModule, state: dict[str, Tensor], tokenizer: Any) -> Any:
    """The model with these weights, as transformers saves it; with what is known of the one that it was trained on
    from: its published format, its settings for generation."""
    from zoo.hf import ZooConfig, model_class

    config, generation = module.saved or (ZooConfig(model=module.network.config), None)
    config = copy.deepcopy(config)
    with torch.random.fork_rng(devices=[]):
        model: Any = model_class(config)(config)
    model.model.load_state_dict(state)
    if not model.can_generate():
        return model
    if generation is not None:
        model.generation_config = copy.deepcopy(generation)
    if tokenizer is not None and tokenizer.end is not None and model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = tokenizer.end
    return model


def gather(trainer: Any) -> dict[str, Tensor]:
    """The network's whole weights on the CPU, or its adapters' alone where those are trained; of a sharded one they
    come together on rank 0 alone."""
    network, adapters = trainer.lightning_module.network, trainer.lightning_module.adapters
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        state = network.state_dict().items()
        return {n: each.detach().cpu() for n, each in state if adapters is None or n in adapters.names}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapters is not None)
    return cast(dict[str, Tensor], get_model_state_dict(network, options=whole))


class Sharded(ModelParallelStrategy):
    """FSDP2 over all processes (weights, gradients and optimizer state are divided), with whole checkpoints: a run
    resumes on another number of devices' memory, and the file is as any other's."""

    divides_experts: ClassVar[bool] = False

    def __init__(self, **options: Any):
        super().__init__(save_distributed_checkpoint=False, **options)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        read(Path(checkpoint_path))  # a damaged file fails here, with the way out
        return super().load_checkpoint(checkpoint_path, weights_only=True)


class ExpertParallel(Sharded):
    """As `Sharded`, but each process keeps whole experts of every mixture and tokens travel to them: experts' weights
    are never gathered. The number of processes must divide the number of experts."""

    divides_experts: ClassVar[bool] = True
