"""Experts divided over processes against one process that has them all."""

import copy
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing import spawn

import zoo
from zoo.moe.moe import MoE
from zoo.moe.parallel import divide_experts, local

WIDTH, EXPERTS = 12, 8
KINDS = {
    "top_k": {},
    "shared": {"shared_experts": 2, "top_k": 3},
    "biases": {"expert": {"kind": "mlp", "bias": True}, "router": "sinkhorn"},
    "mpo": {"expert": {"kind": "mpo", "bond": 6, "activation": "gelu"}},
}


def mixture(name: str) -> MoE:
    torch.manual_seed(0)
    return MoE(WIDTH, experts=EXPERTS, hidden=10, **KINDS[name]).double()


def inputs(rank: int, case: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Different tokens on each process: other lengths, padding, all alike (few experts get any), or one process that
    has padding only."""
    torch.manual_seed(10 + rank)
    x = torch.randn(2, 5 + 3 * rank, WIDTH, dtype=torch.float64)
    segments = torch.ones(x.shape[:2], dtype=torch.long)
    if case == "alike":
        x = torch.ones_like(x)
    if case == "padding":
        segments[:, -2:] = 0
        segments[:, : 5 if rank == 1 else 1] = 0
        if rank == 1:
            segments[:] = 0
    return x.requires_grad_(), segments if case == "padding" else None


def run(moe: MoE, rank: int, case: str) -> dict[str, torch.Tensor]:
    """Output and gradients of a loss of this process's tokens."""
    x, segments = inputs(rank, case)
    out = moe.train()(x, segments=segments)
    names = [name for name, _ in moe.named_parameters()]
    loss = (out.y * torch.linspace(-1, 1, WIDTH, dtype=torch.float64)).square().sum() + out.aux["loss/load_balance"]
    found = torch.autograd.grad(loss, [x, *moe.parameters()])
    return {
        "y": out.y.detach(),
        "load": out.aux["stat/load"],
        "x": found[0],
        **dict(zip(names, found[1:], strict=True)),
    }


def process(rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    for name in KINDS:
        whole = mixture(name)
        divided = copy.deepcopy(whole)
        assert len(divide_experts(nn.ModuleList([divided]), mesh)) == (2 if name in ("top_k", "shared") else 4)
        assert local(getattr(divided.experts, divided.experts.per_expert[0])).shape[0] == EXPERTS // world
        for case in ("random", "alike", "padding"):
            found, wanted = run(divided, rank, case), run(whole, rank, case)
            every = [run(whole, each, case) for each in range(world)]
            for key, value in wanted.items():
                got = found[key]
                if key.startswith("experts."):
                    if hasattr(got, "full_tensor"):
                        got = got.full_tensor()
                    else:  # shared by experts: each process has the part of its own
                        dist.all_reduce(got)
                        got = got / world
                    value = sum(each[key] for each in every) / world
                torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-12, msg=f"{name}, {case}, {key}")
        # Without gradients a few tokens take the long way too: this process has not all experts.
        x = torch.randn(1, 1, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
        with torch.no_grad():
            torch.testing.assert_close(divided.eval()(x).y, whole.eval()(x).y, rtol=1e-12, atol=1e-12)
        state = {
            key: each.full_tensor() if hasattr(each, "full_tensor") else each
            for key, each in divided.state_dict().items()
        }
        assert all(torch.equal(state[key], each) for key, each in whole.state_dict().items())
    refusals(mesh, world)
    dist.destroy_process_group()


def refusals(mesh, world: int) -> None:
    with pytest.raises(ValueError, match=rf"0: experts=9 do not divide over {world} processes"):
        divide_experts(nn.ModuleList([MoE(WIDTH, experts=9)]), mesh)
    with pytest.raises(ValueError, match="there are no experts to divide"):
        divide_experts(zoo.block("swiglu", WIDTH), mesh)
    own = MoE(WIDTH, experts=4)
    own.experts = nn.Identity()
    with pytest.raises(ValueError, match="Identity does not tell which of its parameters"):
        divide_experts(nn.ModuleList([own]), mesh)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_divided_experts_answer_as_one_process_does(world):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    spawn(process, (world, port), nprocs=world)
