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
