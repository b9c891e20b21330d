"""The language model as Lightning trains it: loss, metrics, optimizer, sharding."""

import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import lightning
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from train.data.windows import IGNORED
from train.lora import Adapters, LoRAConfig
from train.masking import MaskingConfig
from train.objective import Batch, objective
from train.optim import OptimizerConfig, ScheduleConfig, build
from zoo.block import add_sums
from zoo.config import ModelConfig
from zoo.model import LanguageModel, losses
from zoo.moe.parallel import divide_experts


class LanguageModule(lightning.LightningModule):
    """Training of a `LanguageModel` for the objective that its configuration names.

    Args:
        network: the model's configuration, or a YAML file with one.
        optimizer: which, its rates and decay.
        schedule: how the rate goes over the run.
        masking: of a masked model: which tokens it must guess, and what it reads in their place.
        activation_checkpointing: compute each block's activations again in the backward pass instead of storing them.
        compile: torch.compile the model.
    """

    def __init__(
        self,
        network: ModelConfig,
        *,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (frozen)
        schedule: ScheduleConfig = ScheduleConfig(),  # noqa: B008 (frozen)
        masking: MaskingConfig = MaskingConfig(),  # noqa: B008 (frozen)
        activation_checkpointing: bool = False,
        compile: bool = False,
    ):
        super().__init__()
        self.network = network if isinstance(network, LanguageModel) else LanguageModel(network)
        self.objective = objective(self.network.config, masking)
        self.network.gradient_checkpointing = activation_checkpointing
        self.adapters: Adapters | None = None  # what is trained in the network's place
        self.saved: tuple[Any, Any] | None = None  # configuration and generation settings of the model trained on from
        self.optimizer_config, self.schedule_config, self.compile_network = optimizer, schedule, compile
        self.gradient_norm: Tensor | None = None  # of the last step, before clipping
        self.batches = 0  # of this rank, since the run began
        self.adding: dict[str, Tensor] = {}  # the blocks' sums so far: of this rank, since the last optimizer step
        self.sums: dict[str, Tensor] = {}  # of all ranks, over the last optimizer step; empty if it was skipped
        self.text = torch.zeros(self.objective.counted, dtype=torch.float64)  # sums over the validation text

    # Setting up -----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self.objective.setup(data, self.network.config.vocab_size)
        check_length(self.network, getattr(data, "length", 1))

    def configure_model(self) -> None:
        """Shard over the device mesh where the strategy has one; compile. Lightning may call this more than once."""
        mesh = self.device_mesh
        if mesh is not None and mesh["data_parallel"].size() > 1 and not getattr(self, "sharded", False):
            from torch.distributed.fsdp import fully_shard

            self.sharded, mesh = True, mesh["data_parallel"]
            divides = getattr(self.trainer.strategy, "divides_experts", False)
            if divides and self.adapters is not None and self.adapters.on_experts:
                raise ValueError(
                    "trainer.strategy expert_parallel divides experts; their adapters need them whole: use sharded, "
                    f"or leave {self.adapters.on_experts} out of model.lora.targets"
                )
            divided = divide_experts(self.network, mesh) if divides else set()
            for each in self.network.blocks:
                fully_shard(each, mesh=mesh, ignored_params=divided)
            fully_shard(self.network, mesh=mesh, ignored_params=divided)
        if self.compile_network:
            self.compile_network = False
            self.network.compile()  # in place: names of parameters stay

    def configure_optimizers(self) -> Any:
        # A fused optimizer would undo float16's loss scale itself, after the gradients were clipped with it.
        fused = self.trainer.precision != "16-mixed" and self.device.type in ("cpu", "cuda")
        optimizer, schedule = build(self.network, self.optimizer_config, self.schedule_config, self._steps(), fused)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _steps(self) -> int:
        """Optimizer steps of the whole run. Not Lightning's `estimated_stepping_batches`: that opens the training
        loader before a checkpoint's place in the data is restored, and the place is then lost."""
        trainer = self.trainer
        batches = len(trainer.datamodule.train_dataloader())  # type: ignore[attr-defined]
        found = [-(-batches // trainer.accumulate_grad_batches) * max(trainer.max_epochs or 1, 1)]
        found += [trainer.max_steps] if trainer.max_steps > 0 else []
        if min(found) > 10**9:
            raise ValueError("how long shall this train? Set trainer.max_steps, or data.passes over the text")
        return min(found)

    # Steps ----------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        self.adding = {}  # of batches whose step an earlier fit did not come to

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Random numbers of a batch (dropout, router jitter) follow from the seed, the rank and the batch's number:
        a resumed run draws what an uninterrupted one does, whatever ran in between."""
        torch.manual_seed(self._seed())
        self.batches += 1

    def _seed(self, purpose: str = "") -> int:
        drawn = f"{os.environ.get('PL_GLOBAL_SEED', 0)}/{self.global_rank}/{self.batches}{purpose}"
        return int.from_bytes(hashlib.sha256(drawn.encode()).digest()[:7], "big")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        task = self.objective.training(batch, torch.Generator().manual_seed(self._seed("/task")))
        out = self.network(task.tokens, segments=batch.get("segments"), targets=task.targets)
        predicted = (task.targets != IGNORED).sum()
        nats = out.nats
        # Ranks average their gradients: dividing by the mean count makes that the gradient over all tokens together.
        mean = nats / self._mean_over_ranks(predicted.float()).clamp_min(1)
        loss = mean + losses(out.aux)
        add_sums(self.adding, out.aux)
        self.last = {"loss": mean.detach(), "aux": {name: value.detach() for name, value in out.aux.items()}}
        return loss

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """An optimizer step, the last batch of it included, and what the blocks do after one. Checkpoints are written
        later, so that they hold both."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        before = 0.0 if scaler is None else scaler.get_scale()
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        skipped = scaler is not None and scaler.get_scale() < before  # float16: gradients overflowed
        found, self.adding = self.adding, {}
        self.sums = {} if skipped else self._sum_over_ranks(found)
        if not skipped and self.adapters is None:  # what blocks do then would change the model under the adapters
            self.network.after_step(self.trainer.global_step + 1, self.sums)  # Lightning counts this step later

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by the norm over all parameters, sharded or not (Lightning's own refuses fused optimizers in mixed
        precision, for float16's sake), and keep the norm for the log."""
        if gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(self.parameters(), gradient_clip_val or float("inf"))
        else:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val or float("inf"))
            self.gradient_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm

    def on_validation_epoch_start(self) -> None:
        self.text.zero_()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        task = self.objective.validation(batch)
        targets = None if self.objective.reads_logits else task.targets
        out = self.network(task.tokens, segments=batch.get("segments"), targets=targets)
        nats = self._nats(out.logits, task.targets) if targets is None else out.nats
        self.text += self.objective.count(out.logits, task, nats, batch).cpu()

    def on_validation_epoch_end(self) -> None:
        total = self.trainer.strategy.reduce(self.text.to(self.device, torch.float64), reduce_op="sum")
        metrics = self.objective.metrics([float(each) for each in total])  # type: ignore[union-attr]
        self.log_dict(metrics, sync_dist=self.trainer.world_size > 1)  # the same on all ranks already

    @staticmethod
    def _nats(logits: Tensor, targets: Tensor) -> Tensor:
        """Summed, float32: a sum over a batch of T·B terms keeps its digits."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")

    def _mean_over_ranks(self, value: Tensor) -> Tensor:
        if self.trainer.world_size > 1:
            dist.all_reduce(value)
            value = value / self.trainer.world_size
        return value

    def _sum_over_ranks(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """All of them in one exchange, as float64: it holds counts exactly up to 2^53."""
        if self.trainer.world_size == 1 or not sums:
            return sums
        whole = torch.cat([each.double().flatten() for each in sums.values()])
        dist.all_reduce(whole)
        parts = whole.split([each.numel() for each in sums.values()])
        return {name: part.view_as(each).to(each) for (name, each), part in zip(sums.items(), parts, strict=True)}

    # What a checkpoint holds besides Lightning's own ------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["zoo"] = {"network": self.network.config.to_dict(), "batches": self.batches}
        if self.adapters is not None:
            checkpoint["zoo"]["lora"] = self.adapters.about
            names = {f"network.{name}" for name in self.adapters.names}
            checkpoint["state_dict"] = {n: each for n, each in checkpoint["state_dict"].items() if n in names}

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        saved = checkpoint.get("zoo")
        if saved is None:
            raise ValueError("this checkpoint was not written by `zoo pretrain` or `zoo finetune`; give one that was")
        # Read as any configuration: one of a newer version is refused, one of an older takes today's defaults.
        check_same(ModelConfig.from_dict(saved["network"]).to_dict(), self.network.config.to_dict())
        self._check_lora(saved.get("lora"))
        if self.adapters is not None and "state_dict" in checkpoint:  # a sharded strategy has loaded it already
            odd = {f"network.{name}" for name in self.adapters.names} ^ set(checkpoint["state_dict"])
            if odd:
                raise ValueError(f"the checkpoint's adapters have other names than this peft's: {min(odd)}, ...")
        self.batches = saved["batches"]

    def _check_lora(self, saved: Mapping[str, Any] | None) -> None:
        """Raise ValueError for a checkpoint of other adapters, or of whole weights where adapters train."""
        now = None if self.adapters is None else self.adapters.about
        if saved is None or now is None:
            if saved is not now:
                held, trained = ("all weights", "adapters") if saved is None else ("adapters", "all weights")
                raise ValueError(
                    f"the checkpoint holds {held} and this run trains {trained}; resume with the run's own config.yaml"
                )
            return
        for name, value in now.items():
            if saved.get(name) != value:
                what = "the saved model is another one" if name == "base" else f"model.lora.{name}={value!r} now"
                raise ValueError(
                    f"the checkpoint's adapters were trained with {name}={saved.get(name)!r}, and {what}; resume with "
                    "the run's own config.yaml and the same saved model"
                )


class FromPretrained(LanguageModule):
    """Training of a saved model.

    Args:
        pretrained: folder or hub id of the saved model, ours or of a published format (or of an adapter, which is
            merged); its weights are read from safetensors.
        lora: train adapters of this kind in the place of the weights.
        options: as for a new model.
    """

    def __init__(self, pretrained: str | None = None, *, lora: LoRAConfig | None = None, **options: Any):
        if pretrained is None:
            raise ValueError("which saved model? Give its folder or hub id with --from")
        model = load_saved(pretrained)
        if lora is None:
            model.float()
        super().__init__(network=model.model, **options)
        self.pretrained, self.saved = pretrained, (model.config, getattr(model, "generation_config", None))
        if lora is not None:
            self.adapters = Adapters(model, lora, pretrained)
            self.strict_loading = False  # a checkpoint holds adapters alone
        self.network.train()  # it comes in eval mode

    def setup(self, stage: str) -> None:
        super().setup(stage)
        tokenizer = getattr(self.trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]
        if tokenizer is not None:
            check_tokenizer(self.pretrained, tokenizer, masked=self.network.config.objective == "masked")


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the first key in which two configurations of a network differ."""
    for name, value in now.items():
        if saved.get(name) != value:
            raise ValueError(
                f"the checkpoint's network has {name}={saved.get(name)!r}, the configuration's {name}={value!r}; "
                "resume with the run's own config.yaml, or drop --ckpt_path to train the new network from the start"
            )


def check_length(network: LanguageModel, length: int) -> None:
    """Raise ValueError for a block that is built for shorter documents than windows of `length` tokens may hold: it
    would stop the run at the first such document, which may come late."""
    from zoo.attention.projected import Projected
    from zoo.layers.learned_position import LearnedPosition

    limits: dict[type, str] = {Projected: "length", LearnedPosition: "context"}
    for spec, each in zip(network.config.blocks(), network.residuals, strict=True):
        for part in each.modules():  # of blocks side by side each
            option = next((name for kind, name in limits.items() if isinstance(part, kind)), None)
            if option is not None and (limit := getattr(part, option)) < length:
                raise ValueError(
                    f"model.network.{spec.where} (kind {spec.kind}) is built for documents of at most "
                    f"{option}={limit} tokens and data.length={length} cuts longer ones; set data.length to "
                    f"{limit}, or the block's {option} to {length}"
                )


def check_tokenizer(name: str, tokenizer: Any, masked: bool = False) -> None:
    """Raise ValueError where a saved model's own tokenizer (if one is beside it) gives tokens other meanings than the
    data's: its weights would know nothing of those."""
    from zoo.hf import byte_tokenizer, load_tokenizer

    try:
        own = load_tokenizer(name).get_vocab()
    except (OSError, ValueError):
        return
    bytes_ = byte_tokenizer(mask=masked)
    if own != getattr(tokenizer, "tokenizer", bytes_).get_vocab():
        way = "bytes" if own == bytes_.get_vocab() else name
        raise ValueError(
            f"the model {name!r} was trained with another tokenizer than data.tokenizer={tokenizer.name!r}; "
            f"set data.tokenizer to {way!r}"
        )


def load_pretrained(name: str) -> LanguageModel:
    """The network of a saved model, in float32, to be trained on."""
    return load_saved(name).model.float().train()


def load_saved(name: str) -> Any:
    """A model saved with `save_pretrained`, in a published format or as an adapter, by folder or hub id: a
    `ZooPreTrainedModel` in the dtype it is stored in. Weights come from safetensors alone."""
    from zoo.convert import load
    from zoo.hf import hide_progress

    hide_progress()  # one bar on the screen is enough
    try:
        return load(name)
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(
            f"no model could be loaded from {name!r}: {type(error).__name__}: {error}. Give a folder that a run or "
            "save_pretrained wrote (with config.json and model.safetensors), or a hub id this machine can reach"
        ) from error
