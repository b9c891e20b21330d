"""Two processes (replicated, sharded) against one."""

import csv

import pytest
import torch

from tests.train.helpers import DENSE, HYBRID, finish, start, write_config, write_text
from train.checkpoint import read
from train.module import load_pretrained


def curve(folder, name):
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    """The same windows a step, the loss over all their tokens, clipping by the norm over all shards; Muon for the
    matrices and fused AdamW for the rest."""
    text = write_text(tmp_path / "text")
    stack = [*DENSE, {"kind": "mamba", "state_size": 4}]
    config = write_config(tmp_path / "c.yaml", text, stack, log_every_n_steps=1, gradient_clip_val=0.5)
    shared = ["pretrain", "--config", config, "--model.optimizer.name", "muon", "--trainer.limit_val_batches", "1.0"]
    runs = {}
    for name, options in {
        "one": ["--data.batch_size", "8"],
        "ddp": ["--trainer.devices", "2", "--trainer.strategy", "ddp"],
        "sharded": ["--trainer.devices", "2", "--trainer.strategy", "sharded"],
    }.items():
        runs[name] = start(*shared, "--trainer.default_root_dir", tmp_path / name, *options)
        if name != "one":
            finish(runs[name])
    finish(runs["one"])
    one = load_pretrained(str(tmp_path / "one" / "model")).state_dict()
    for name in ("ddp", "sharded"):
        for metric in ("train/loss", "val/loss", "val/bits_per_byte", "train/gradient_norm"):
            first, other = curve(tmp_path / "one", metric), curve(tmp_path / name, metric)
            assert len(first) == len(other) > 1
            torch.testing.assert_close(torch.tensor(other), torch.tensor(first), atol=1e-5, rtol=1e-5)
        found = load_pretrained(str(tmp_path / name / "model")).state_dict()
        for key, value in one.items():
            torch.testing.assert_close(found[key], value, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_a_sharded_hybrid_resumes_and_loads(tmp_path):
    """Experts, dropout, accumulation and Muon, sharded; the checkpoint is one file and its export one model."""
    text = write_text(tmp_path / "text")
    config = write_config(tmp_path / "c.yaml", text, HYBRID, accumulate_grad_batches=2)
    shared = ["pretrain", "--config", config, "--model.network.dropout", "0.1", "--model.optimizer.name", "muon"]
    shared += ["--trainer.devices", "2", "--trainer.strategy", "sharded"]
    finish(start(*shared, "--trainer.default_root_dir", tmp_path / "whole"))
    again = tmp_path / "again"
    (again / "checkpoints").mkdir(parents=True)
    third = again / "checkpoints" / "step-6.ckpt"
    third.write_bytes((tmp_path / "whole" / "checkpoints" / "step-6.ckpt").read_bytes())
    finish(start(*shared, "--trainer.default_root_dir", again, "--ckpt_path", "last"))
    one, two = (read(each / "checkpoints" / "step-8.ckpt")["state_dict"] for each in (tmp_path / "whole", again))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    exported = load_pretrained(str(again / "model")).state_dict()
    assert all(torch.equal(value, exported[name.removeprefix("network.")]) for name, value in two.items())


@pytest.mark.slow
def test_divided_experts_train_as_one_process_does(tmp_path):
    """Experts on two processes and the rest sharded, clipped by one norm and resumed from a checkpoint of all: the
    curves of one process with all tokens. (A balance loss is of each process's tokens, so it is left out here.)"""
    text = write_text(tmp_path / "text")
    stack = [*DENSE, {"kind": "moe", "experts": 4, "top_k": 2, "shared_experts": 1, "load_balance": 0.0}]
    config = write_config(tmp_path / "c.yaml", text, stack, log_every_n_steps=1, gradient_clip_val=0.5)
    shared = ["pretrain", "--config", config, "--trainer.limit_val_batches", "1.0"]
    divided = ["--trainer.devices", "2", "--trainer.strategy", "expert_parallel"]
    one = start(*shared, "--trainer.default_root_dir", tmp_path / "one", "--data.batch_size", "8")
    finish(start(*shared, "--trainer.default_root_dir", tmp_path / "two", *divided))
    finish(one)
    again = tmp_path / "again"
    (again / "checkpoints").mkdir(parents=True)
    (again / "checkpoints" / "step-6.ckpt").write_bytes((tmp_path / "two" / "checkpoints" / "step-6.ckpt").read_bytes())
    finish(start(*shared, "--trainer.default_root_dir", again, *divided, "--ckpt_path", "last"))
    for metric in ("train/loss", "val/loss", "train/gradient_norm"):
        first, other = curve(tmp_path / "one", metric), curve(tmp_path / "two", metric)
        assert len(first) == len(other) > 1
        torch.testing.assert_close(torch.tensor(other), torch.tensor(first), atol=1e-5, rtol=1e-5)
    found, wanted, resumed = (
        load_pretrained(str(tmp_path / each / "model")).state_dict() for each in ("two", "one", "again")
    )
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, atol=1e-3, rtol=0)
        assert torch.equal(resumed[key], found[key]), key
