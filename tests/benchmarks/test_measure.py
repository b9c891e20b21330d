"""Where results are kept."""

import json

import pytest

from benchmarks import measure


@pytest.mark.parametrize(
    ("cpu", "folder"),
    [
        ("AMD EPYC", "amd_epyc"),
        ("Intel(R) Xeon(R) Processor", "intel_xeon"),
        ("Intel(R) Core(TM) i7-9700K CPU @ 3.60GHz", "intel_core_i7_9700k"),
        ("", "cpu"),
    ],
)
def test_results_of_a_processor_have_a_folder(cpu, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(measure, "machine", lambda: {"cpu": cpu})
    row = {"task": "t", "shape": "s", "ms": 2.0, "tokens_per_s": None, "roof_ms": 1.0}
    measure.write("found", "# Title", [row | {"who": measure.OURS}, row | {"who": "peer", "ms": 5.0}])
    kept = json.loads((tmp_path / folder / "found.json").read_text())
    assert kept["machine"] == {"cpu": cpu}
    assert [each["ms"] for each in kept["rows"]] == [2.0, 5.0]
    assert "| t | s | peer | 5.00 |  | 20% | 2.50 |" in (tmp_path / folder / "found.md").read_text()


def test_a_call_that_the_host_disturbed_is_made_again(monkeypatch):
    calls, now = [], [0.0]
    stolen = iter([0.0, 2.0, 2.0, 2.01, 9.0, 10.0])  # before and after each call: two seconds of ten, then almost none

    def run():
        calls.append(None)
        now[0] += 10.0 if len(calls) == 1 else 7.0

    monkeypatch.setattr(measure, "stolen_seconds", lambda: next(stolen))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    assert measure._call(run) == 7.0
    assert len(calls) == 2
    now[0] = 0.0
    stolen = iter([0.0, 3.0, 3.0, 4.0, 4.0, 6.0])  # never quiet: the least disturbed of three
    durations = iter([10.0, 11.0, 12.0])

    def slow():
        now[0] += next(durations)

    assert measure._call(slow) == 11.0
    stolen = iter([0.0, 30.0])  # long enough to be made once
    durations = iter([100.0])
    assert measure._call(slow) == 100.0
