"""The commands themselves: what LightningCLI builds from a configuration, and where a run lives."""

import os
import time
from pathlib import Path
from typing import Any, cast

import lightning
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import StrategyRegistry

from train.checkpoint import AtomicCheckpointIO, Checkpoints, ExpertParallel, Sharded, checkpoints, read
from train.data.module import TextData
from train.data.tokenizer import own_tokenizer
from train.experts import DeadExperts
from train.metrics import Metrics, loggers
from train.module import FromPretrained, LanguageModule
from train.progress import Progress

if "sharded" not in StrategyRegistry:
    StrategyRegistry.register("sharded", Sharded, description="FSDP2 over all processes, whole checkpoints")
    StrategyRegistry.register("expert_parallel", ExpertParallel, description="as sharded, but experts stay whole")


class Trainer(lightning.Trainer):
    """Lightning's Trainer with the commands' names."""

    def pretrain(self, model: LanguageModule, datamodule: TextData, ckpt_path: str | None = None) -> None:
        """Train a new model from a configuration.

        Args:
            ckpt_path: checkpoint to resume from; "last": the newest of the run in trainer.default_root_dir, if any.
        """
        self._train(model, datamodule, ckpt_path)

    def finetune(self, model: LanguageModule, datamodule: TextData, ckpt_path: str | None = None) -> None:
        """Train on from a saved model (`--from`).

        Args:
            ckpt_path: checkpoint to resume from; "last": the newest of the run in trainer.default_root_dir, if any.
        """
        self._train(model, datamodule, ckpt_path)

    def _train(self, model: LanguageModule, datamodule: TextData, ckpt_path: str | None) -> None:
        before = 0 if ckpt_path is None else int(read(Path(ckpt_path))["global_step"])
        if self.is_global_zero and model.adapters is not None:
            print(model.adapters.told(), flush=True)
        self.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)
        if self.is_global_zero and self.global_step == before:
            print(f"nothing to train: step {before} of trainer.max_steps={self.max_steps} is reached")
        elif self.is_global_zero:
            print(f"step {self.global_step}: {self.default_root_dir} holds model/, metrics.csv and loss.png")
            found = model.objective.summary({name: float(each) for name, each in self.callback_metrics.items()})
            if found:
                print(f"last validation: {found}")


DEFAULTS = {
    "max_epochs": 1,  # the loader gives all passes in one of Lightning's epochs
    "num_sanity_val_steps": 0,
    "check_val_every_n_epoch": None,  # validation counts steps, not epochs
    "val_check_interval": 1000,
    "limit_val_batches": 100,
    "log_every_n_steps": 10,
    "gradient_clip_val": 1.0,
    "use_distributed_sampler": False,  # the data side deals windows to ranks itself
    "enable_model_summary": False,
}


USAGE = "--config FILE.yaml [--KEY VALUE ...] [--print_config] [--help]"


class Run(LightningCLI):
    """Parses, builds and runs one command."""

    def __init__(self, argv: list[str]):
        self.command = argv[0]
        super().__init__(
            LanguageModule if self.command == "pretrain" else FromPretrained,
            TextData,
            trainer_class=Trainer,
            trainer_defaults=DEFAULTS,
            seed_everything_default=0,
            # Validation writes nothing: it has no folder of its own.
            save_config_callback=None if self.command == "validate" else SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            # The full usage would bury an error under a hundred options; --help lists them anyway.
            parser_kwargs={"prog": "zoo", self.command: {"usage": f"zoo {self.command} {USAGE}"}},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=argv,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        # Only the command asked for: the parser of each takes a second to build.
        return {self.command: {"model", "datamodule", "dataloaders", "weights_only"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        if self.command != "validate":
            parser.add_lightning_class_args(Checkpoints, "checkpoint")
        if self.command != "pretrain":
            text = "folder or hub id of a saved model (a run's folder holds it as model/), published model or adapter"
            parser.add_argument("--from", type=str | None, default=None, help=text)
            parser.link_arguments("from", "model.pretrained")

    def _parse_ckpt_path(self) -> None:
        """The configuration is the command's own; a checkpoint does not change it."""

    # Where a run lives ------------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        config = self.config[self.command]
        folder, chosen = config.trainer.default_root_dir, config.get("ckpt_path")
        self.resumed_at: int | None = None
        if self.command == "validate":
            return
        if folder is None:
            # Rank 0 decides; processes that Lightning starts later read the same variable.
            beside = Path(chosen).parent.parent if chosen and chosen != "last" else None
            folder = beside or os.environ.setdefault(
                "ZOO_RUN_FOLDER", time.strftime(f"runs/{self.command}-%Y%m%d-%H%M%S")
            )
        config.trainer.default_root_dir = str(folder)
        there = checkpoints(Path(folder) / "checkpoints")
        if chosen == "last":
            chosen = config.ckpt_path = str(there[-1]) if there else None
        if chosen is None and there and os.environ.get("LOCAL_RANK", "0") == "0":
            raise ValueError(
                f"the folder {folder} holds a run with {len(there)} checkpoints; resume it with --ckpt_path last, or "
                "choose another --trainer.default_root_dir"
            )
        if chosen is not None:
            self.resumed_at = int(read(Path(chosen))["global_step"])

    def instantiate_classes(self) -> None:
        """Where none is chosen, a saved model comes with its tokenizer."""
        super().instantiate_classes()
        saved, data = self.config[self.command].get("from"), self.config[self.command].data
        if saved is not None and data.tokenizer is None:
            data.tokenizer = self.datamodule.tokenizer_name = own_tokenizer(saved)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.command]["trainer"]
        folder = Path(config["default_root_dir"] or ".")
        if config["logger"] in (None, True):
            kwargs["logger"] = self.command != "validate" and loggers(folder, self.resumed_at)
        self.metrics = Metrics()
        given = _listed(config["callbacks"])
        mine: list[Any] = [self.metrics] if self.command != "validate" else []
        if self.command != "validate" and not any(isinstance(each, DeadExperts) for each in given):
            mine.append(DeadExperts())
        if config["enable_progress_bar"] is not False:
            mine.append(Progress(self.metrics))
        kwargs["callbacks"] = [*given, *mine]
        kwargs["plugins"] = [*_listed(config["plugins"]), AtomicCheckpointIO()]
        try:
            return cast(Trainer, super().instantiate_trainer(**kwargs))
        except MisconfigurationException as error:
            raise ValueError(
                f"the trainer cannot be set up so: {error} Change trainer.accelerator={config['accelerator']!r}, "
                f"devices={config['devices']!r}, strategy={config['strategy']!r} or precision={config['precision']!r}; "
                "'auto' takes what this machine has"
            ) from error


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
