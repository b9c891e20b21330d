"""What the tests of train share: a small text, tiny models, runs in this process and in others."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning
import yaml

from train.data.module import TextData
from train.module import LanguageModule
from train.optim import OptimizerConfig, ScheduleConfig
from zoo.config import ModelConfig

ROOT = Path(__file__).parents[2]
DENSE = [{"kind": "gqa", "heads": 2, "kv_heads": 1}, "swiglu"]
MOE = {"kind": "moe", "experts": 4, "top_k": 2, "router": {"kind": "top_k", "jitter": 0.1}}
HYBRID = [*DENSE, {"kind": "mamba", "state_size": 4}, MOE]


def write_text(folder: Path, files: int = 8, words: int = 400) -> Path:
    """A folder of text files, the same each time."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["the", "a", "of", "to", "state", "model", "token", "block", "scan", "chunk", "wave", "gate", "é"]
    for index in range(files):
        lines = [" ".join(draw.choices(vocabulary, k=8)) for _ in range(words // 8)]
        (folder / f"text{index}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def network(stack: list[Any] = DENSE, width: int = 16, **options: Any) -> ModelConfig:
    return ModelConfig(vocab_size=256, width=width, stack=stack, **options)


def module(config: ModelConfig | None = None, *, name: Any = "adamw", **options: Any) -> LanguageModule:
    import torch

    torch.manual_seed(0)
    return LanguageModule(
        config or network(),
        optimizer=OptimizerConfig(name=name, learning_rate=1e-2, muon_learning_rate=1e-2),
        schedule=ScheduleConfig(warmup=2),
        **options,
    )


def data(folder: Path, **options: Any) -> TextData:
    settings: dict[str, Any] = {"length": 32, "batch_size": 4, "cache": str(folder.parent / "cache")}
    return TextData(str(folder), **settings | options)


def trainer(folder: Path, **options: Any) -> lightning.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "max_steps": 4,
        "check_val_every_n_epoch": None,
        "val_check_interval": 100,
        "limit_val_batches": 2,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
    }
    return lightning.Trainer(**settings | options)


def write_config(path: Path, text: Path, stack: list[Any] = DENSE, **trainer_options: Any) -> Path:
    """A configuration file for the commands, for a run of seconds."""
    config = {
        "seed_everything": 1,
        "model": {
            "network": {"vocab_size": 256, "width": 16, "stack": stack},
            "optimizer": {"learning_rate": 1e-2},
            "schedule": {"warmup": 2},
        },
        "data": {"source": str(text), "length": 32, "batch_size": 4, "cache": str(path.parent / "cache")},
        "checkpoint": {"every": 3},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 8,
            "val_check_interval": 4,
            "limit_val_batches": 2,
            "log_every_n_steps": 2,
            **trainer_options,
        },
    }
    path.write_text(yaml.safe_dump(config))
    return path


def start(*arguments: Any) -> subprocess.Popen[str]:
    """Start a command in a process of its own, on one thread, away from any distributed settings of this one."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PL_", "ZOO_"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "PYTHONFAULTHANDLER": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "train.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment,
    )


def finish(process: subprocess.Popen[str], expected: int = 0, seconds: int = 300) -> str:
    """Wait for it; its output."""
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == expected, output[-20000:]
    return output


class KillAt(lightning.Callback):
    """SIGKILL of this very process after so many batches."""

    def __init__(self, batch: int):
        self.batch = batch

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)
