"""The GPU measurements, at tiny sizes on the CPU: every row runs, is checked, and is written down."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch

import ops
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import report
from benchmarks.gpu.build import narrowed
from benchmarks.gpu.checking import Part, errors, poisoned, same, values
from benchmarks.gpu.contest import FORWARD, Contestant, Task, launches, rows
from benchmarks.gpu.peers import peer
from benchmarks.gpu.setting import Setting, Work


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    gpu.main(["--smoke", "--out", str(folder)])
    return folder


def test_every_row_runs(written):
    data = json.loads((written / "gpu.json").read_text())
    assert tuple(data) == gpu.GROUPS
    for group, held in data.items():
        assert held["complete"] and held["rows"], group
        assert held["machine"]["torch"] == torch.__version__ and held["machine"]["copy_bytes_per_s"] > 0
        for row in held["rows"]:
            if not row["who"].startswith("zoo"):
                assert "absent" in row or row["ms"] > 0
                assert "absent" not in row or row["absent"].startswith(("not here", "failed"))
                continue
            assert row["ms"] > 0 and row["roof_ms"] > 0 and row["bytes"] > 0, row
            assert row["same_tokens"] == 1 if "same_tokens" in row else row["checked"] < 1e-4, row
    assert len({(row["task"], row["shape"]) for held in data.values() for row in held["rows"]}) >= 24


def test_others_compute_the_same(written):
    """Those that run here: torch's own ways."""
    held = [row for each in json.loads((written / "gpu.json").read_text()).values() for row in each["rows"]]
    found = {row["who"]: row["checked"] for row in held if "checked" in row and not row["who"].startswith("zoo")}
    assert {"F.conv1d", "F.grouped_mm", "F.grouped_mm with permutes", "torch.fft"} <= set(found)
    assert max(found.values()) < 1e-4


def test_the_table_tells_all(written):
    text = (written / "gpu.md").read_text()
    assert all(f"## {group}\n" in text for group in gpu.GROUPS)
    assert "| forward | zoo (chunked) |" in text and "Target: >= 3 times torch.fft." in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert {line.count("|") for line in lines} == {len(report.COLUMNS) + 1}


def test_a_group_again_keeps_the_others(written):
    before = json.loads((written / "gpu.json").read_text())
    gpu.main(["--smoke", "--out", str(written), "--repeats", "1", "convolution"])
    after = json.loads((written / "gpu.json").read_text())
    assert after["scan"] == before["scan"]
    assert after["convolution"] != before["convolution"] and after["convolution"]["rows"][0]["runs"] == 1


def test_no_time_left(tmp_path, capsys):
    gpu.main(["--smoke", "--minutes", "0", "--out", str(tmp_path), "long_conv"])
    assert "long_conv: not begun" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_compiling_alone_writes_nothing(tmp_path):
    gpu.main(["--smoke", "--compile", "--out", str(tmp_path), "long_conv"])
    assert not list(tmp_path.iterdir())


def test_a_forced_implementation(tmp_path):
    """The kernels themselves, interpreted."""
    gpu.main(["--smoke", "--impl", "triton", "--repeats", "1", "--out", str(tmp_path), "delta_rule"])
    ours = next(row for row in json.loads((tmp_path / "gpu.json").read_text())["delta_rule"]["rows"])
    assert (ours["who"], ours["impl"]) == ("zoo", "triton") and ours["checked"] < 1e-4


def test_unknown_group_and_no_gpu(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        gpu.main(["scans"])
    assert "unknown group scans; choose from convolution, scan" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA GPU here; --smoke"):
        gpu.main(["scan", "--out", str(tmp_path)])


# What a row is kept from telling --------------------------------------------------------------------------------


def task(run, **more):
    """Doubling x, of which "zoo" does whatever `run` does."""
    part = Part(same("batch time channels", "x", "out"), lambda x: 2 * x, tokens=4, channels=3)
    runs = {"zoo": Contestant(run), **more}
    work = {FORWARD: Work(8.0), "forward+backward": Work(16.0)}
    return Task("double", "small", "none", {"x": torch.randn(3, 9, 5)}, runs, work, part)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, *grads):
        return 2.1 * grads[0]


def unwritten(x):
    """Leaves the first token of the last row as the allocator gave it."""
    y = torch.empty_like(x)
    y[:-1] = 2 * x[:-1]
    y[-1, 1:] = 2 * x[-1, 1:]
    return y


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (lambda x: 2 * x, None),
        (lambda x: 2.1 * x, "WRONG: .* is off by 0.05"),
        (lambda x: WrongGradient.apply(x), "WRONG: dx is off by 0.05"),
        (unwritten, "WRONG: out is off by inf"),
        (lambda x: torch.cat([2 * x[..., :-1], x[..., -1:]], -1), "WRONG"),
        (lambda x: x @ x, "failed: RuntimeError"),
    ],
)
def test_a_wrong_result_is_not_timed(run, said):
    found = rows(task(run, peer=Contestant(lambda x: x + x), gone="not here"), Setting(smoke=True))
    ours, theirs = ([row for row in found if row["who"] == who] for who in ("zoo", "peer"))
    assert [row["pass"] for row in theirs] == [FORWARD, "forward+backward"] and theirs[0]["checked"] < 1e-6
    assert [row["absent"] for row in found if row["who"] == "gone"] == ["not here"]
    if said is None:
        assert all(row["ms"] > 0 and row["checked"] < 1e-6 for row in ours) and len(ours) == 2
    else:
        assert len(ours) == 1
        assert re.match(said, ours[0]["absent"]), ours[0]["absent"]


def test_a_peer_that_computes_another_thing_shows_it():
    found = rows(task(lambda x: 2 * x, peer=Contestant(lambda x: 3 * x)), Setting(smoke=True))
    assert {round(row["checked"], 3) for row in found if row["who"] == "peer"} == {0.5}


def test_the_part_behind_a_window():
    """The last tokens, and as many before them as they see."""
    part = Part(same("batch time heads d", "q", "k", "v", "out"), None, window=4, tokens=3)
    q, k, v = torch.randn(3, 2, 20, 3, 8).double()
    assert part.cut("q", q).shape == (1, 7, 2, 8) and part.cut("out", q, output=True).shape == (1, 3, 2, 8)
    run = lambda q, k, v: ops.attention(q, k, v, window=4, impl="reference")  # noqa: E731
    found = values(run(q, k, v), {"q": q, "k": k, "v": v}, part._replace(reference=run))
    assert errors(found)["out"] < 1e-12


def test_poison_ends_with_the_check():
    torch.use_deterministic_algorithms(False)
    try:
        with poisoned():
            assert torch.empty(1000).isnan().all()
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def test_missing_and_broken_peers(monkeypatch):
    assert peer("no_such_module:f", lambda f: f).startswith("not here (ModuleNotFoundError: No module named")
    monkeypatch.setitem(sys.modules, "mamba_ssm", SimpleNamespace())
    assert peer("mamba_ssm:selective_scan", lambda f: f).endswith("; see docs/gpu.md")
    assert peer("math:sqrt", lambda f: f(4)) == 2


def test_a_package_without_its_init(tmp_path, monkeypatch):
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("import what_is_not_here\n")
    (tmp_path / "mamba_ssm" / "part.py").write_text("answer = 42\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("mamba_ssm", "mamba_ssm.part"):
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]
    assert peer("mamba_ssm.part:answer", lambda found: found) == 42


SETUP = """
cc_flag.append("-gencode")
cc_flag.append("arch=compute_80,code=sm_80")
if version >= 12:
    cc_flag.append("-gencode")
    cc_flag.append("arch=compute_90,code=sm_90")
if version >= 13:
    cc_flag.append("-gencode")
    cc_flag.append("arch=compute_100,code=sm_100")
"""


def test_peers_are_compiled_for_one_architecture():
    flags = []
    exec(narrowed(SETUP, "90"), {"cc_flag": flags, "version": 13})
    assert flags == ["-gencode", "arch=compute_90,code=sm_90"]


def test_launches_are_told(monkeypatch):
    from triton.runtime.jit import JITFunction

    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: "ran")
    fake, found = SimpleNamespace(fn=lambda: None), {}
    fake.fn.__name__ = "forward"
    with launches(found):
        for block in (64, 64, 32):
            assert JITFunction.run(fake, 1, grid=(3,), BLOCK=block, FLAG=True, num_warps=4, scale=0.5) == "ran"
    assert found == {"forward": "BLOCK=64 num_warps=4", "forward'": "BLOCK=32 num_warps=4"}
    assert JITFunction.run(fake, 1) == "ran" and len(found) == 2


@pytest.mark.gpu
def test_smoke_on_a_gpu(tmp_path):
    """Events, graphs and kernels."""
    gpu.main(["--smoke", "--out", str(tmp_path)])
    for group, held in json.loads((tmp_path / "gpu.json").read_text()).items():
        ours = [row for row in held["rows"] if row["who"].startswith("zoo")]
        assert ours and all("ms" in row for row in ours), group
