"""The benchmark commands run, on models and images small enough for a test, and the README's are theirs."""

import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from benchmarks import (
    best,
    conversions,
    costs,
    fidelity,
    graphs,
    kills,
    load,
    loop,
    merging,
    prediction,
    ranks,
    reference,
    speed,
    transformers_4,
)
from benchmarks.foreign_files import SOURCES
from benchmarks.steps import describe_error
from torch import nn
from transformers import AutoModelForImageClassification, ViTImageProcessor

from model_cards.facts import RUN, TrainingRun, read_run, write_run
from model_cards.metadata import find_card_errors
from model_cards.rendering import CARD
from model_cards.scaling import FACTS, REPORT, render_study
from modeling_vit_custom import ViTCustomForImageClassification, preset_config
from modeling_vit_custom.convert.graphs import OLDEST_TORCH
from trainers.arguments import COMMON_GROUPS, RECIPES, TrainingArguments, parse_arguments, read_recipe
from trainers.hub import RECIPE, render_recipe
from trainers.models import make_model, read_processor
from trainers.pace import count_flops


FOLDER = Path(__file__).parent / "benchmarks"
SCRIPTS = {
    "best": best,
    "conversions": conversions,
    "costs": costs,
    "fidelity": fidelity,
    "graphs": graphs,
    "load": load,
    "loop": loop,
    "merging": merging,
    "prediction": prediction,
    "reference": reference,
    "speed": speed,
    "transformers_4": transformers_4,
    "kills": kills,
    "ranks": ranks,
}
QUICK = ["--repeats", "2", "--warmup", "1", "--device", "cpu", "--no_progress"]
ONE_ROW = [*QUICK, "--models", "ViT-S", "--workloads", "inference:64:1", "--dtypes", "float32", "--compile", "no"]
RATIO = r"\d+\.\d\d \[\d+\.\d\d, \d+\.\d\d\]"
FIGURES = r"[\d.,]+ / [\d.,]+ / [\d.,]+"


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
    assert "- CPU: " in text and "- versions: torch " in text and shlex.join([*argv[:-1], "fidelity.md"]) in text
    rows = [line for line in text.splitlines() if re.match(r"\| (DeiT|PVT)", line)]
    # Two libraries and one, each with two attention implementations.
    assert len(rows) == 6
    assert all(float(row.split(" | ")[-2]) <= fidelity.BOUND for row in rows)


def test_fidelity_fails_above_the_bound(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fidelity, "max_difference", lambda ours, theirs: 2e-5)
    assert fidelity.main(["--models", "DeiT III-S", "--image_size", "32", "--batch_size", "1"]) == 1
    monkeypatch.setattr(fidelity, "max_difference", lambda ours, theirs: float("nan"))
    assert fidelity.main(["--models", "DeiT III-S", "--image_size", "32", "--batch_size", "1"]) == 1


@pytest.fixture(scope="module")
def speed_table(tmp_path_factory) -> tuple[list[str], Path]:
    """Arguments of a run without --output, and the table that they made."""
    argv = [*QUICK, "--models", "DeiT-S distilled", "PVT-T", "--dtypes", "bfloat16", "autocast", "--compile", "no"]
    argv += ["--workloads", "inference:64:1", "training:64:1"]
    output = tmp_path_factory.mktemp("speed") / "speed.md"
    assert speed.main([*argv, "--output", str(output)]) == 0
    return argv, output


def test_speed_tabulates_ratios_and_costs(speed_table: tuple[list[str], Path]):
    argv, output = speed_table
    text = output.read_text()
    assert "- CPU: " in text and "timm " in text and shlex.join([*argv, "--output", "speed.md"]) in text
    assert re.search(r"bfloat16 [\d.]+ TFLOP/s at the start, [\d.]+ at the end\n", text)
    assert re.findall("^## .*", text, re.MULTILINE) == ["## Inference, eager", "## Training step, eager"]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| (DeiT|PVT)", line)]
    # Two models; autocast is for training alone.
    assert len(rows) == 2 + 4
    for model, shape, _, transformers, timm, images, utilisation, peak, attention in rows:
        assert shape == "64 x 1"
        assert re.fullmatch(RATIO, transformers)
        assert re.fullmatch(RATIO + (" `pvt_v2_b1`" if model == "PVT-T" else ""), timm)
        assert re.fullmatch(FIGURES, images) and re.fullmatch(FIGURES, utilisation)
        assert re.fullmatch(FIGURES, peak) or not Path("/proc/self/clear_refs").exists()
        assert attention == ("auto / eager / sdpa" if model == "PVT-T" else "auto / sdpa / sdpa")
    assert f"]({output.stem}.png)" in text and output.with_suffix(".png").stat().st_size > 0


def test_speed_writes_every_time(speed_table: tuple[list[str], Path]):
    records = [json.loads(line) for line in speed_table[1].with_suffix(".jsonl").read_text().splitlines()]
    assert len(records) == 6
    for record in records:
        assert {"date", "load average at the start"} < record["environment"].keys()
        assert min(record["matrix_rates"]) > 0
        assert list(record["measurements"]) == ["ours", "transformers", "timm"]
        for library, measurement in record["measurements"].items():
            assert measurement["error"] is None
            assert len(measurement["times"]) == 2 and min(measurement["times"]) > 0
            # The same weights in all three libraries.
            is_other = record["row"]["model"] == "PVT-T" and library == "timm"
            assert measurement["max_difference"] is None if is_other else measurement["max_difference"] <= 1e-4
    # A training step counts as three forward passes, whatever the dtype.
    by_mode = {(record["row"]["model"], record["row"]["mode"]): record["measurements"]["ours"] for record in records}
    for model in ("DeiT-S distilled", "PVT-T"):
        assert by_mode[model, "training"]["flops"] == 3 * by_mode[model, "inference"]["flops"] > 0


def test_speed_goes_on_where_it_ended(speed_table: tuple[list[str], Path], tmp_path: Path):
    argv, before = speed_table
    first = before.with_suffix(".jsonl").read_text().splitlines(keepends=True)[0]
    output = tmp_path / "speed.md"
    output.with_suffix(".jsonl").write_text(first)
    argv = [*argv, "--models", "PVT-T", "--workloads", "inference:64:1", "--output", str(output)]
    assert speed.main(argv) == 0
    lines = output.with_suffix(".jsonl").read_text().splitlines(keepends=True)
    assert lines[0] == first and len(lines) == 2
    assert re.findall(r"^\| (DeiT-S|PVT-T)", output.read_text(), re.MULTILINE) == ["DeiT-S", "PVT-T"]
    assert speed.main(argv) == 0
    assert output.with_suffix(".jsonl").read_text() == "".join(lines)


def test_speed_reports_without_measuring(speed_table: tuple[list[str], Path], tmp_path: Path, capsys):
    _, before = speed_table
    output = tmp_path / "speed.md"
    # In another order, and over years.
    first, *others = before.with_suffix(".jsonl").read_text().splitlines(keepends=True)
    record = json.loads(first)
    record["environment"] |= {"date": "2020-01-01 00:00 UTC", "load average at the start": 111.5}
    lines = [*reversed(others), json.dumps(record) + "\n"]
    output.with_suffix(".jsonl").write_text("".join(lines))
    assert speed.main(["--report", "--output", str(output)]) == 0
    text = output.read_text()
    assert text == capsys.readouterr().out
    assert text.split("## ")[1:] == before.read_text().split("## ")[1:]
    assert "- date: 2020-01-01 00:00 UTC to 20" in text and " to 111.5\n" in text
    assert output.with_suffix(".jsonl").read_text() == "".join(lines)


def test_speed_refuses_a_file_of_something_else(speed_table: tuple[list[str], Path], tmp_path: Path, capsys):
    argv, before = speed_table
    file = tmp_path / "speed.jsonl"
    record = json.loads(before.with_suffix(".jsonl").read_text().splitlines()[0])
    record["environment"]["versions"] = "torch 1.0"
    for text, complaint in {
        json.dumps(record): "earlier figures are of versions torch 1.0, these would be of torch 2",
        json.dumps(record) + '\n{"environment": {}}': f"{file}, line 2 is no row of this benchmark",
        json.dumps(record | {"row": record["row"] | {"model": "ResNet-50"}}): f"{file}, line 1 is no row",
        '{"row"': f"{file}, line 1 is no row",
    }.items():
        file.write_text(text + "\n")
        with pytest.raises(SystemExit) as error:
            speed.main([*argv, "--output", str(file.with_suffix(".md"))])
        assert error.value.code == 2
        assert complaint in capsys.readouterr().err
        assert file.read_text() == text + "\n"
    file.unlink()
    with pytest.raises(SystemExit) as error:
        speed.main(["--report", "--output", str(file.with_suffix(".md"))])
    assert error.value.code == 2 and "there are no rows to report" in capsys.readouterr().err


def test_speed_shows_why_a_peer_failed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setitem(speed.ARCHITECTURES["ViT-S"], "timm", lambda image_size: Failing())
    monkeypatch.setattr(speed, "load_into_timm", lambda model, ours: model)
    assert speed.main(ONE_ROW) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert re.search(rf"{RATIO} \| timm failed: RuntimeError: no such \\\| operator in a second line \|", row)
    assert re.search(r"[\d.]+ / [\d.]+ / - \|", row)


def test_speed_says_when_a_peer_is_another_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(speed, "load_into_timm", lambda model, ours: model)
    assert speed.main(ONE_ROW) == 0
    assert re.search(rf"{RATIO} \| {RATIO} \*\*not the same model\*\*", capsys.readouterr().out)


def test_speed_says_when_peers_pad_differently():
    # Grids of 72, 36, 18 and 9 patches; windows of 7.
    ours, *peers = speed.build_contenders("Swin-T", 288)
    assert [contender.error for contender in (ours, *peers)] == [None] * 3
    assert ours.note == "" and {peer.note for peer in peers} == {"pads differently"}
    assert all(0 < peer.max_difference < 1 for peer in peers)


def test_speed_counts_the_products_of_a_model():
    model = speed.ARCHITECTURES["ViT-32px"]["transformers"](32)
    tokens, width = 64 + 1, 192
    block = tokens * 12 * width**2 + 2 * tokens**2 * width
    assert speed.count_flops(model, 32) == 2 * (64 * 3 * 4**2 * width + 6 * block + width * 10)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="main memory is asked of Linux")
def test_speed_measures_what_a_step_takes():
    peak = speed.measure_peak(lambda: torch.ones(16_000_000) + 1, "cpu")  # two of 64 MB at once
    assert 120 < peak < 160
    # Not what was taken before.
    kept = torch.ones(16_000_000)
    assert speed.measure_peak(lambda: kept.mean(), "cpu") < 32


def test_speed_times_every_model_on_images_that_fit_it():
    rows = speed.list_rows(speed.parse_arguments(["--device", "cpu"]))
    assert len(rows) == len(set(rows)) == 134
    assert all((row.model == "ViT-32px") == (row.image_size == 32) for row in rows)
    assert {row.mode for row in rows if row.dtype == "autocast"} == {"training"}
    doubled = ["--models", "ViT-S", "ViT-S", "--workloads", "inference:224:1", "inference:224:1", "--compile", "no"]
    assert len(speed.list_rows(speed.parse_arguments(doubled))) == 2


@pytest.mark.slow
def test_speed_compiles(capsys: pytest.CaptureFixture):
    argv = ["--models", "ViT-32px", "--workloads", "inference:32:1", "--dtypes", "float32", "--compile", "yes"]
    assert speed.main([*QUICK, *argv]) == 0
    text = capsys.readouterr().out
    assert "failed" not in text and "## Inference, compiled" in text
    assert re.search(r"medians over rows: ours [\d.]+ s, transformers [\d.]+ s, timm [\d.]+ s\.$", text)


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--models", "ResNet-50"], "ResNet-50"),
        (["--workloads", "inference:100:1"], "'inference:100:1': the image size 100 must be a multiple of 32"),
        (["--workloads", "inference:30:1"], "'inference:30:1': the image size 30 must be a multiple of 4"),
        (["--workloads", "training:224:0"], "'training:224:0': 0 must be at least 1"),
        (["--workloads", "training:x:1"], "'training:x:1': 'x' is no whole number"),
        (["--workloads", "training:224"], "'training:224' must be MODE:IMAGE_SIZE:BATCH_SIZE"),
        (["--workloads", "testing:224:1"], "'testing:224:1' must be MODE:IMAGE_SIZE:BATCH_SIZE, MODE of inference"),
        (["--workloads", "inference:224:1", "--dtypes", "autocast"], "--dtypes autocast"),
        (["--workloads", "inference:32:1", "--models", "ViT-S"], "images below 64 pixels are for ViT-32px"),
        (["--output", "no/such/folder/speed.md"], "no/such/folder/speed.md"),
        (["--report"], "--output"),
    ],
)
def test_speed_refuses_what_it_cannot_time(argv: list[str], complaint: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as error:
        speed.main(argv)
    assert error.value.code == 2
    assert complaint in capsys.readouterr().err


def test_scripts_run_from_anywhere(tmp_path: Path):
    command = [sys.executable, str(FOLDER / "speed.py"), "--help"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "Examples:" in result.stdout


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


@pytest.mark.slow
def test_best_compares_all_ways(tmp_path, capsys):
    argv = ["--models", "PVT-T", "--image_size", "64", "--batch_size", "2", "--seconds", "0.1"]
    best.main([*argv, "--output", str(tmp_path / "best.md")])
    text = (tmp_path / "best.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert str(tmp_path) not in text
    rows = dict(re.findall(r"\| (\w+, [\w, ]+) \| [\d.]+ \| (.*) \|", text))
    assert len(re.findall(RATIO, text)) == len(rows) + 2
    # transformers' PVT has one attention, timm no PVT of this version.
    attentions = {"ours": ("auto", "eager"), "transformers": ("eager",)}
    ways = {
        f"{library}, {kind}, {each}" for library, names in attentions.items() for kind in best.KINDS for each in names
    }
    assert rows.keys() == {*ways, "ours, int8"}


@pytest.mark.slow
def test_best_tells_what_int8_costs(labelled, tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.parquet").write_bytes(labelled.read_bytes())
    argv = ["--data", str(tmp_path), "--calibration_images", "8", "--max_images", "10"]
    table = best.measure_accuracy(best.parse_arguments(argv))
    assert "on 10 images, int8 calibrated on 8 training images" in table
    accuracies = dict(re.findall(r"\| (\w+) \| ([\d.]+)% \|", table))
    assert accuracies.keys() == {"float32", "bfloat16", "int8"}
    assert all(float(accuracy) % 10 == 0 for accuracy in accuracies.values())


def test_best_says_what_data_it_lacks(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        best.main(["--models", "PVT-T", "--data", str(tmp_path)])
    assert exit_.value.code == 2
    assert "train.parquet' is no file" in capsys.readouterr().err


@pytest.fixture
def labelled(tmp_path) -> Path:
    """A parquet file of 12 images of noise with classes of their own."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(12)})
    noise = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    rows = datasets.Dataset.from_dict({"image": list(noise), "label": list(range(12))}, features=features)
    rows.to_parquet(tmp_path / "noise.parquet")
    return tmp_path / "noise.parquet"


def test_merging_is_compared_on_the_same_images(labelled, tmp_path, capsys):
    model = ViTCustomForImageClassification(preset_config("vit_nano_patch2_8", num_labels=12)).eval()
    model.save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
    argv = ["--model", str(tmp_path / "model"), "--data", str(labelled), "--batch_size", "5", "--device", "cpu"]
    merging.main([*argv, "--counts", "4", "1", "--output", str(tmp_path / "merging.md")])
    text = (tmp_path / "merging.md").read_text()
    assert text in capsys.readouterr().out
    assert "--data noise.parquet" in text and str(tmp_path) not in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| \d", line)]
    assert [row[0] for row in rows] == ["0", "1", "4"]
    assert rows[0][1:3] == ["1.00 [1.00, 1.00]", "1.00"] and rows[0][4] == "-"
    assert 0.3 < float(rows[2][2]) < float(rows[1][2]) < 1
    assert all(re.fullmatch(RATIO, row[1]) for row in rows)
    processor = ViTImageProcessor.from_pretrained(tmp_path / "model")
    images = datasets.load_dataset("parquet", data_files=str(labelled), split="train")["image"]
    with torch.no_grad():
        classes = model(processor(list(images), return_tensors="pt")["pixel_values"]).logits.argmax(dim=-1)
    assert rows[0][3] == f"{(classes == torch.arange(12)).double().mean():.2%}"


@pytest.mark.parametrize(
    ("preset", "data", "message"),
    [
        ("vit_nano_patch2_8", "nothing.parquet", "nothing.parquet' is no file"),
        ("swin_nano_patch1_window4_8", "noise.parquet", "token_merging=2 needs a single stage of global attention"),
    ],
)
def test_merging_refuses_what_it_cannot_compare(preset, data, message, labelled, tmp_path, capsys):
    ViTCustomForImageClassification(preset_config(preset)).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit) as exit_:
        merging.main(["--model", str(tmp_path / "model"), "--data", str(tmp_path / data), "--device", "cpu"])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_commands_of_the_readme_parse(tmp_path: Path):
    commands = re.findall(r"^python tests/benchmarks/(\w+)\.py(.*)$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert {script for script, _ in commands} == set(SCRIPTS)
    for script, arguments in commands:
        SCRIPTS[script].parse_arguments(shlex.split(arguments.replace("path/to/photographs", str(tmp_path))))


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


REFERENCE = """
pair:
  title: Positions, old and new
  text: On ten colours.
  measures: [rare_recall, accuracy]
  seeds: [0, 1]
  options: --validation_fraction 0 --max_steps 2 --per_device_train_batch_size 32 --save_strategy no --card_images 0
  runs:
    base: finetune --model vit_nano_patch4_32 --config_overrides num_hidden_layers=1
    reset: reset_positions --model {base} --image_size 48
    as it was: finetune --model {base}
    new: finetune --model {reset}
  compared: [as it was, new]
  cards: [new]
later:
  title: Not run yet
  text: Nothing.
  measures: [accuracy]
  seeds: [0]
  options: --max_steps 1
  runs: {alone: finetune --model vit_nano_patch4_32}
  compared: [alone]
  cards: []
"""


@pytest.fixture
def references(tmp_path, monkeypatch) -> Path:
    """A place of its own for results and README.md."""
    monkeypatch.setattr(reference, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(reference, "README", tmp_path / "README.md")
    reference.RESULTS.mkdir()
    (reference.RESULTS / "experiments.yaml").write_text(REFERENCE)
    reference.README.write_text("before\n<!-- begin results: of a command -->\n<!-- end results -->\nafter\n")
    return tmp_path


@pytest.mark.slow
def test_references_are_trained_once_and_tabulated(ten_colours: Path, references: Path):
    argv = ["--experiments", "pair", "--dataset", str(ten_colours), "--folder", str(references / "runs")]
    argv += ["--dataset_title", "Colours"]
    reference.main(argv)
    facts = sorted(path.relative_to(reference.RESULTS).as_posix() for path in reference.RESULTS.rglob(RUN))
    assert facts == [f"pair/{name}/seed_{seed}/run.json" for name in ("as_it_was", "base", "new") for seed in (0, 1)]
    card = reference.RESULTS / "pair" / "new" / "seed_0" / CARD
    assert not find_card_errors(card.read_text(), card.parent)
    assert read_recipe(card.parent / RECIPE)["dataset"] == ten_colours.name
    assert card.read_text().count("[Positions, old and new](../../../README.md#pair)") == 1
    assert "of the local folder" not in card.read_text() and "of Colours" in card.read_text()
    assert 'reset_positions("runs/base_N", 48, N, "runs/reset_N")' in (reference.RESULTS / "README.md").read_text()
    folders = {name: references / "runs" / "pair" / name for name in ("base_0", "reset_0", "reset_1")}
    base, old, other = (AutoModelForImageClassification.from_pretrained(each).state_dict() for each in folders.values())
    (positions,) = {name for name in base if base[name].shape != old[name].shape}
    assert {name for name in old if not old[name].equal(base[name])} == {positions}
    assert not old[positions].equal(other[positions])
    assert old[positions].std() == pytest.approx(0.02, rel=0.1)  # nothing of the trained ones, nor smoothed
    readme, page = reference.README.read_text(), (reference.RESULTS / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("after\n")
    assert "recall of the 3 rarest classes: as it was " in readme and "Not run yet" not in readme + page
    assert "[new](pair/new/seed_0/README.md)" in page and "--max_steps 2" in page
    # two of 13 steps in 400 images of its own, and as many of the model that it starts from
    assert len(re.findall(r"^\| (?:new|as it was) \|.*\| 124 \|", page, re.MULTILINE)) == 2
    shutil.rmtree(references / "runs")
    reference.main(argv)  # nothing is left to train
    assert not (references / "runs").exists()
    assert (reference.README.read_text(), (reference.RESULTS / "README.md").read_text()) == (readme, page)
    shutil.rmtree(reference.RESULTS / "pair" / "new" / "seed_1")
    with pytest.raises(SystemExit) as exit_:
        reference.main([*argv[:2], "--dataset", str(references / "nowhere"), *argv[4:]])
    assert exit_.value.code == 2


@pytest.mark.parametrize(
    "change", [("--max_steps 2", "--max_steps 3"), ("trainers.finetune", "trainers.pretrain"), None]
)
def test_facts_of_another_command_are_refused(references: Path, capsys, change):
    experiment = reference.read_experiments()["pair"]
    folder = experiment.folder("as it was", 1)
    folder.mkdir(parents=True)
    script, *options = experiment.argv("as it was", {"base": "base_1"})
    command = f"python -m trainers.{script} {shlex.join(options)} --dataset colours"
    run = TrainingRun(name="as_it_was_1", seed=1, command=command)
    write_run(folder, run)
    assert experiment.find("as it was", 1).command == command
    reference.main(["--report"])
    capsys.readouterr()
    write_run(folder, replace(run, seed=0) if change is None else replace(run, command=command.replace(*change)))
    with pytest.raises(SystemExit) as exit_:
        reference.main(["--report"])
    error = capsys.readouterr().err.strip()
    assert exit_.value.code == 2 and len(error.splitlines()) == 1
    assert "is of another command than 'as it was' of pair with seed 1" in error


def test_references_measure_the_rare_classes():
    def run(recalls: list[float]) -> TrainingRun:
        matrix = np.diag(np.array(recalls) * 10)
        matrix[:, 0] += 10 - matrix.sum(axis=1)
        labels = [str(index) for index in range(len(recalls))]
        return TrainingRun(name="a", confusion_matrix=matrix, label_names=labels, results={"accuracy": 0.5})

    runs = [run([1.0, 0.9, 0.5, 0.1, 0.2, 0.3]), run([1.0] * 6)]
    assert reference.measure(runs, "rare_recall") == pytest.approx([0.2, 1.0])
    assert reference.measure(runs, "frequent_recall") == pytest.approx([0.8, 1.0])
    assert reference.measure(runs, "accuracy") == pytest.approx([0.5, 0.5])
    assert reference.format_percent(np.array([0.25, 0.75])) == "50.0 ± 35.4 %"
    assert reference.format_points(np.array([-0.5])) == "-50.0 points"


def test_errors_are_told_without_the_command_of_a_compiler():
    error = describe_error(RuntimeError("no such\n  instruction\n\nCommand:\ng++ /home/me/a.cpp"))
    assert error == "RuntimeError: no such instruction"


def test_times_of_references_are_told_by_hardware():
    times = np.array([60.0, 90.0, 120.0])
    assert reference.format_times(times) == "1 min 30 s"
    assert reference.format_times(times, ["a", "b", "a"]) == "1 min 30 s on a, 1 min 30 s on b"
    assert reference.format_times(times, ["a", "a", "b"]) == "1 min 15 s on a, 2 min 00 s on b"


def test_tables_say_what_the_runs_left():
    for file, text in reference.render(reference.read_experiments().values()).items():
        assert file.read_text(encoding="utf-8") == text


def test_facts_are_those_of_an_experiment():
    experiments = reference.read_experiments().values()
    known = {
        experiment.folder(run, seed): (experiment, run, seed)
        for experiment in experiments
        for run in experiment.trained
        for seed in experiment.seeds
    }
    kept = {file.parent for file in reference.RESULTS.rglob(RUN)}
    assert kept and kept <= set(known)
    for folder in kept:
        experiment, run, seed = known[folder]
        facts = experiment.find(run, seed)
        assert facts.evaluation_split == "test" and facts.split_sizes["test"] == 10_000
        assert facts.objective or sum(facts.confusion_matrix.sum(axis=1)) == 10_000
        words = shlex.split(facts.command)
        given = dict(pairwise(words))
        for name in ("train_fraction", "train_imbalance"):
            assert getattr(facts, name) == (float(given[f"--{name}"]) if f"--{name}" in words else None)
        assert bool(facts.teacher_folder) == ("--teacher" in words)
        balancing = {"--logit_adjustment", "--class_balanced_sampling", "--class_weight_beta"}.intersection(words)
        assert {f"--{name}" for name in facts.rebalancing or {}} == balancing
        has_card = run in experiment.cards and seed == experiment.seeds[0]
        assert has_card == (folder / CARD).is_file()
        if has_card:
            assert not find_card_errors((folder / CARD).read_text(encoding="utf-8"), folder)


def test_architectures_are_trained_at_equal_cost(tmp_path):
    experiment, flops = reference.read_experiments()["architectures"], {}
    groups = [*COMMON_GROUPS, TrainingArguments]
    for name in experiment.trained:
        _, *options = experiment.argv(name, {})
        argv = [*options, "--dataset", "cifar10", "--output_dir", str(tmp_path)]
        model, *_, training, _ = parse_arguments(groups, argv, "finetune", "", "")
        model, processor = make_model(model, [str(label) for label in range(10)])
        size, _, _ = read_processor(processor)
        flops[name] = training.num_train_epochs * count_flops(model, size)
    assert max(flops.values()) / min(flops.values()) < 1.01


def test_the_page_of_the_grid_is_that_of_its_facts_and_its_recipe():
    facts = json.loads((reference.RESULTS / reference.SCALING / FACTS).read_text(encoding="utf-8"))
    page = (reference.RESULTS / reference.SCALING / REPORT).read_text(encoding="utf-8")
    assert page == render_study(facts)
    recipe, results = read_recipe(RECIPES / "cifar10_scaling.yaml"), facts["results"]
    axes = {"family": "models", "width": "widths", "fraction": "fractions", "seed": "seeds"}
    cells = {tuple(result[axis] for axis in axes) for result in results}
    assert cells == set(itertools.product(*(recipe[name] for name in axes.values()))) and len(cells) == len(results)
    assert (facts["epochs"], facts["min_steps"]) == (recipe["num_train_epochs"], recipe["min_steps"])
    assert facts["seconds"] / facts["jobs"] < 60 * recipe["max_minutes"]


def test_recipes_of_results_name_no_folders():
    recipes = list(reference.RESULTS.rglob(RECIPE))
    assert recipes
    for file in recipes:
        assert render_recipe(file) == file.read_text(encoding="utf-8")
        fields, run = read_recipe(file), read_run(file.parent)
        for name, on_hub in (("dataset", run.dataset), ("model", run.base_model), ("teacher", run.teacher)):
            assert "/" not in fields.get(name, "") or fields[name] == on_hub
