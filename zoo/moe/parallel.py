"""Expert parallelism (GShard, 2006.16668): each process holds some of the experts, and tokens travel to them.

The processes of a one-dimensional DeviceMesh share the experts of each mixture out evenly: the first has the first
E / processes of them, and so on. Every process routes its own tokens. Rows go to the processes of their experts by one
all-to-all, the experts' answers come back by another, and gradients take the same ways in reverse.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh


class _AllToAll(Function):
    """Row blocks of `sent` sizes to the processes in order; theirs to this one, of `received` sizes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.way = sent, received, group
        found = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(found, rows.contiguous(), received, sent, group=group)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received, group = ctx.way
        found = grads[0].new_empty(sum(sent), grads[0].shape[1])
        dist.all_to_all_single(found, grads[0].contiguous(), sent, received, group=group)
        return found, None, None, None


class _Permute(Function):
    """rows[order], `inverse` being the inverse permutation: the gradient is a gather too, not a sum by index."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


class _Averaged(Function):
    """The tensor itself; its gradient divided by `processes`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, processes: int) -> Tensor:
        ctx.processes = processes
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] / ctx.processes, None


def local(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter that is stacked by expert: all of it, unless experts are divided.

    Each process's loss is the mean over its own tokens, and data parallelism averages the processes' gradients. A
    divided expert has the tokens of all processes in its gradient, hence their sum: it is divided here.
    """
    if not hasattr(parameter, "to_local"):
        return parameter
    sharded = cast(Any, parameter)
    return cast(Tensor, _Averaged.apply(sharded.to_local(), sharded.device_mesh.size()))


class Exchange:
    """Runs the experts of all processes of `mesh` on the rows of all, as `experts(rows, sizes)` would on one.

    All processes must call it together, as often as each other. The sizes of what travels must be known on the host:
    one synchronisation a call. Cost: each row travels there and back, and twice more in the backward pass.
    """

    def __init__(self, mesh: DeviceMesh):
        self.group, self.processes = mesh.get_group(), mesh.size()

    def __call__(
        self, experts: nn.Module, rows: Float[Tensor, "rows width"], sizes: Int[Tensor, " experts"]
    ) -> Float[Tensor, "rows width"]:
        """`rows` sorted by expert, `sizes` to each of all experts; rows behind the last expert's come out as zeros."""
        return cast(Any, _exchange)(self.group, self.processes, experts, rows, sizes)


@torch.compiler.disable  # what is sent where is known when it runs
def _exchange(group: dist.ProcessGroup, processes: int, experts: nn.Module, rows: Tensor, sizes: Tensor) -> Tensor:
    mine = sizes.new_empty(sizes.shape)  # from each process to each expert here
    dist.all_to_all_single(mine, sizes.contiguous(), group=group)
    each = mine.view(processes, -1)
    sent, received = torch.stack([sizes.view(processes, -1).sum(1), each.sum(1)]).tolist()
    come = cast(Tensor, _AllToAll.apply(rows[: sum(sent)], sent, received, group))
    # They lie by sender, then by expert; experts want theirs together.
    expert = torch.arange(each.shape[1], device=sizes.device).repeat(processes)
    order = expert.repeat_interleave(mine, output_size=sum(received)).argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    answers = experts(_Permute.apply(come, order, place), each.sum(0))
    back = cast(Tensor, _AllToAll.apply(_Permute.apply(answers, place, order), received, sent, group))
    return torch.cat([back, rows.new_zeros(len(rows) - sum(sent), rows.shape[1])])


def divide_experts(model: nn.Module, mesh: DeviceMesh) -> set[nn.Parameter]:
    """Divide the experts of every mixture in `model` over the processes of `mesh`; returns their new parameters.

    Those are DTensors, sharded by expert, of what the first process held. Their gradients are averages over the
    processes already; those of all other parameters are the caller's to average (DDP, or `fully_shard` with
    `ignored_params` the set returned). Names stay, so a state dict's whole tensors are those of one process.

    Raises ValueError for a model without a mixture, for experts that do not divide evenly, and for experts objects that
    do not tell which parameters they stack (`per_expert`).
    """
    from torch.distributed.tensor import Shard, distribute_tensor

    from zoo.moe.moe import MoE

    if mesh.ndim != 1:
        raise ValueError(
            f"experts are divided over a mesh of one dimension, got {mesh.ndim}; pass one of its dimensions"
        )
    found: set[nn.Parameter] = set()
    for name, each in model.named_modules():
        if not isinstance(each, MoE):
            continue
        count, experts = each.router.experts, each.experts
        if count % mesh.size():
            raise ValueError(
                f"{name}: experts={count} do not divide over {mesh.size()} processes; take as many as divide {count}"
            )
        stacked = getattr(experts, "per_expert", None)
        if not stacked:
            raise ValueError(
                f"{name}: {type(experts).__name__} does not tell which of its parameters are stacked by expert; "
                "give it per_expert, a tuple of their names"
            )
        for parameter in stacked:
            whole = getattr(experts, parameter)
            parts = nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)]), whole.requires_grad)
            setattr(experts, parameter, parts)
            found.add(parts)
        each.exchange = Exchange(mesh)
    if not found:
        raise ValueError("there are no experts to divide: the model has no block of kind moe; use strategy 'sharded'")
    return found
