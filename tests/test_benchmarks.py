"""The benchmark commands run, on models and images small enough for a test, and the README's are theirs."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from benchmarks import conversions, fidelity, graphs, kills, lift, load, prediction, ranks, speed, transformers_4
from benchmarks.foreign_files import SOURCES
from torch import nn

from modeling_vit_custom.convert.graphs import OLDEST_TORCH


FOLDER = Path(__file__).parent / "benchmarks"
SCRIPTS = {
    "conversions": conversions,
    "fidelity": fidelity,
    "graphs": graphs,
    "lift": lift,
    "load": load,
    "prediction": prediction,
    "speed": speed,
    "transformers_4": transformers_4,
    "kills": kills,
    "ranks": ranks,
}
QUICK = ["--image_size", "32", "--batch_size", "1", "--repeats", "2", "--warmup", "1", "--compile", "no"]
QUICK += ["--device", "cpu", "--no_progress"]


class Failing(nn.Module):
    """Takes part in everything but a forward pass."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such | operator\nin a second line")


def test_fidelity_prints_and_writes_its_table(tmp_path: Path, capsys: pytest.CaptureFixture):
    output = tmp_path / "fidelity.md"
    argv = ["--models", "DeiT-S distilled", "PVT-T", "--image_size", "64", "--batch_size", "1", "--output", str(output)]
    assert fidelity.main(argv) == 0
    text = output.read_text()
    assert text in capsys.readouterr().out
    assert "- CPU: " in text and "- versions: torch " in text and shlex.join(argv) in text
    rows = [line for line in text.splitlines() if re.match(r"\| (DeiT|PVT)", line)]
    # Two libraries and one, each with two attention implementations.
    assert len(rows) == 6
    assert all(float(row.split(" | ")[-2]) <= fidelity.BOUND for row in rows)


def test_fidelity_fails_above_the_bound(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fidelity, "max_difference", lambda ours, theirs: 2e-5)
    assert fidelity.main(["--models", "DeiT III-S", "--image_size", "32", "--batch_size", "1"]) == 1
    monkeypatch.setattr(fidelity, "max_difference", lambda ours, theirs: float("nan"))
    assert fidelity.main(["--models", "DeiT III-S", "--image_size", "32", "--batch_size", "1"]) == 1


def test_speed_prints_ratios_and_writes_raw_times(tmp_path: Path, capsys: pytest.CaptureFixture):
    output = tmp_path / "speed.md"
    assert speed.main([*QUICK, "--models", "DeiT-S distilled", "PVT-T", "--output", str(output)]) == 0
    text = output.read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert "- CPU: " in text and "timm " in text and "--image_size 32" in text
    rows = [line for line in text.splitlines() if re.match(r"\| (DeiT|PVT)", line)]
    # Inference in two dtypes, training in three.
    assert len(rows) == 10
    for row in rows:
        ratios = row.split(" | ")[4:6]
        assert re.fullmatch(r"[\d.]+ \[[\d.]+, [\d.]+\]", ratios[0])
        assert (ratios[1] == "-") == row.startswith("| PVT")

    environment, *measurements = map(json.loads, output.with_suffix(".jsonl").read_text().splitlines())
    assert environment["arguments"]["image_size"] == 32
    assert len(measurements) == 5 * 3 + 5 * 2
    for measurement in measurements:
        assert measurement["error"] is None
        assert len(measurement["times"]) == 2 and min(measurement["times"]) > 0
        # The same weights in all three libraries.
        assert measurement["max_difference"] <= 1e-4


def test_speed_shows_why_a_peer_failed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setitem(speed.ARCHITECTURES["ViT-S"], "timm", lambda image_size: Failing())
    monkeypatch.setattr(speed, "load_into_timm", lambda model, ours: model)
    assert speed.main([*QUICK, "--models", "ViT-S", "--modes", "inference", "--dtypes", "float32"]) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert "failed: RuntimeError: no such \\| operator in a second line" in row
    assert re.search(r"no \| [\d.]+ \[[\d.]+, [\d.]+\] \| - \|", row)


def test_speed_says_when_a_peer_is_another_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(speed, "load_into_timm", lambda model, ours: model)
    assert speed.main([*QUICK, "--models", "ViT-S", "--modes", "inference", "--dtypes", "float32"]) == 0
    assert "**not the same model**" in capsys.readouterr().out


@pytest.mark.slow
def test_speed_compiles(capsys: pytest.CaptureFixture):
    argv = ["--models", "ViT-S", "--modes", "inference", "--dtypes", "float32"]
    assert speed.main([*QUICK, *argv, "--compile", "yes"]) == 0
    assert "failed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        ["--models", "ResNet-50"],
        ["--image_size", "100"],
        ["--batch_size", "0"],
        ["--modes", "inference", "--dtypes", "autocast"],
        ["--output", "no/such/folder/speed.md"],
    ],
)
def test_speed_refuses_what_it_cannot_time(argv: list[str], capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as error:
        speed.main(argv)
    assert error.value.code == 2
    assert argv[-1] in capsys.readouterr().err


def test_scripts_run_from_anywhere(tmp_path: Path):
    command = [sys.executable, str(FOLDER / "speed.py"), "--help"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "Example:" in result.stdout


@pytest.mark.slow
def test_conversions_are_tabulated(tmp_path):
    assert conversions.main(["--tiny", "--output", str(tmp_path / "table.md")]) == 0
    rows = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(SOURCES)


@pytest.mark.skipif(torch.__version__ < OLDEST_TORCH, reason=f"torch traces for all sizes from {OLDEST_TORCH} on")
def test_graphs_are_tabulated(tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "BATCHES", ((1, 32, 32), (2, 40, 24)))
    argv = ["--presets", "vit_nano_patch4_32", "--output", str(tmp_path / "table.md")]
    assert graphs.main(argv) == 0
    (row,) = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| vit_nano")]
    assert all(float(cell) <= graphs.BOUND for cell in row.split(" | ")[1:5])
    monkeypatch.setattr(graphs, "max_difference", lambda ours, theirs: float("nan"))
    assert graphs.main(argv[:2]) == 1


def test_commands_of_the_readme_parse():
    commands = re.findall(r"^python tests/benchmarks/(\w+)\.py(.*)$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert {script for script, _ in commands} == set(SCRIPTS)
    for script, arguments in commands:
        SCRIPTS[script].parse_arguments(shlex.split(arguments))


@pytest.fixture(scope="module")
def ten_colours(tmp_path_factory) -> Path:
    """Ten classes of 32-pixel images, 40 of each to train and 4 to test, that differ in brightness."""
    folder = tmp_path_factory.mktemp("data")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("abcdefghij"))})
    draw = np.random.default_rng(0)
    for split, count in {"train": 40, "test": 4}.items():
        labels = [index % 10 for index in range(10 * count)]
        images = [draw.integers(0, 25, (32, 32, 3), dtype=np.uint8) + np.uint8(25 * label) for label in labels]
        rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        rows.to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.mark.slow
def test_lift_compares_runs_and_goes_on_where_it_ended(ten_colours: Path, tmp_path: Path, capsys):
    argv = ["--dataset", str(ten_colours), "--folder", str(tmp_path / "runs"), "--output", str(tmp_path / "lift.md")]
    argv += ["--epochs", "1", "--teacher_epochs", "1", "--images", "20", "--most", "40", "--ratio", "4"]
    lift.main([*argv, "--seeds", "0"])
    first = (tmp_path / "lift.jsonl").read_text().splitlines()
    assert len(first) == 1 + 2 + 3  # a teacher, two students, three treatments
    lift.main([*argv, "--seeds", "0", "1", "--experiments", "imbalance"])
    assert (tmp_path / "lift.jsonl").read_text().splitlines()[:6] == first
    records = [json.loads(line) for line in (tmp_path / "lift.jsonl").read_text().splitlines()]
    assert len(records) == 6 + 3
    assert all(np.mean(record["recall"]) == pytest.approx(record["accuracy"]) for record in records)
    text = (tmp_path / "lift.md").read_text()
    assert "Training images by class: 40, 34, 29, 25, 22, 19, 16, 14, 12, 10;" in text
    assert text.count("| 0, 1 |") == 3


def test_lift_measures_the_rare_classes():
    records = [{"recall": [0.9] * 7 + [0.1, 0.2, 0.3], "accuracy": 0.69}, {"recall": [1.0] * 10, "accuracy": 1.0}]
    assert lift.measure_rare_recall(records) == pytest.approx([0.2, 1.0])
    assert lift.format_percent(np.array([0.25, 0.75])) == "50.00 ± 35.36 (25.00, 75.00)"
    assert lift.format_percent(np.array([0.5])) == "50.00 (50.00)"
