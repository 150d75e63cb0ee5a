"""What a run says of itself while it goes on: figures, lines, and what others that watch it are given."""

import json
import math
import os
import sqlite3
import subprocess
import sys

import pytest
import torch
from tiny_models import random_images, tiny_config, tiny_model

from modeling_vit_custom import ViTCustomForImageClassification, preset_config
from trainers import pace
from trainers.finetune import main as finetune
from trainers.pace import Pace, count_flops, describe_log, describe_seconds, measure_matrix_rate


SHORT = (
    "--dataset digits --model vit_nano_patch2_8 --max_steps 6 --logging_steps 2 --eval_strategy no --save_strategy no "
    "--use_cpu true"
)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    monkeypatch.setattr(pace, "measure_matrix_rate", lambda device, dtype: 1e9)
    return clock


def test_figures_are_of_training_alone(clock):
    model = tiny_model(ViTCustomForImageClassification, "vit")
    measured = Pace(model, torch.device("cpu"), torch.float32, num_processes=2)
    figures = []
    for step in (1, 2):
        with measured.waiting():
            clock.now += 1
        measured.count(random_images(10))
        clock.now += 3
        with measured.pausing():
            clock.now += 50
        figures.append(measured.report(step, max_steps=12))
    assert [each["images_per_second"] for each in figures] == [5.0, 5.0]  # ten of each process in four seconds
    assert [each["data_wait"] for each in figures] == [0.25, 0.25]
    assert "eta_seconds" not in figures[0]
    assert figures[1]["eta_seconds"] == 540  # 54 seconds a step, with what lies between
    utilisation = 3 * 10 * count_flops(model, (32, 32), 10) / 4 / 1e9
    assert figures[1]["mfu"] == pytest.approx(utilisation)
    assert 0 < figures[1]["memory_gb"] < 100


def test_models_whose_products_are_not_known_have_no_utilisation(clock):
    model = tiny_model(ViTCustomForImageClassification, "vit")
    model.model.requires_grad_(False)
    assert "mfu" not in Pace(model, torch.device("cpu"), torch.float32, 1).report(1, 2)


def test_operations_are_those_of_the_papers():
    """17.6 billion products of ViT-B/16 (https://arxiv.org/abs/2012.12877, table 5), each with an addition."""
    base = ViTCustomForImageClassification(preset_config("vit_base_patch16_224"))
    assert count_flops(base, (224, 224)) / 2e9 == pytest.approx(17.6, abs=0.05)
    assert count_flops(base, (384, 384)) > 2.9 * count_flops(base, (224, 224))


def test_counting_leaves_the_model_and_the_draws_alone():
    model = ViTCustomForImageClassification(tiny_config("vit", patch_dropout=0.5)).train()
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args))
    state = torch.get_rng_state()
    whole, dropped = count_flops(model, (32, 32)), count_flops(model, (32, 32), 2)
    assert 0.3 < dropped / whole < 0.45  # half of the patches in all blocks but the last, which has none
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not seen


def test_the_matrix_rate_is_what_a_product_takes():
    assert 1e8 < measure_matrix_rate(torch.device("cpu"), torch.float32) < 1e14


def test_lines_can_be_read():
    logs = {"loss": 1.23456, "learning_rate": 5e-4, "epoch": 1.5, "images_per_second": 1234.4, "data_wait": 0.034}
    logs |= {"memory_gb": 1.25, "mfu": 0.416, "eta_seconds": 725.2, "grad_norm": 3.0}
    assert describe_log(logs, 1200, 5000) == (
        "step 1,200/5,000 | epoch 1.50 | loss 1.2346 | lr 5.00e-04 | 1,234 images/s | waiting for data 3% | 1.2 GB | "
        "MFU 42% | 12 min 5 s left"
    )
    evaluated = {"eval_loss": 0.5, "eval_accuracy": 0.875, "eval_runtime": 3.2, "eval_samples_per_second": 10}
    assert describe_log(evaluated, 7, 9) == "step 7/9 | evaluated | loss 0.5000 | accuracy 87.50% | took 3 s"
    assert describe_log({"train_loss": 1.0, "train_runtime": 3}, 9, 9) == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (12000, "3 h 20 min")])
def test_durations_are_short(seconds, text):
    assert describe_seconds(seconds) == text


@pytest.mark.parametrize("bar", [True, False])
def test_a_run_says_how_it_gets_on(tmp_path, capsys, bar):
    batch = ["--per_device_train_batch_size", "32"]
    finetune([*SHORT.split(), *batch, "--output_dir", str(tmp_path), "--disable_tqdm", str(not bar)])
    printed = capsys.readouterr()
    lines = [line for line in (printed.out + printed.err).replace("\r", "\n").splitlines() if "| loss " in line]
    assert [line.split(" |")[0].split("step ")[1] for line in lines] == ["2/6", "4/6", "6/6"]
    assert all(each in lines[1] for each in ("lr ", "images/s", "waiting for data", "GB", "MFU", "left"))
    assert "{" not in "".join(lines)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    logged = [entry for entry in state["log_history"] if "loss" in entry]
    assert all(math.isfinite(entry[name]) for entry in logged for name in ("images_per_second", "data_wait", "mfu"))
    model = ViTCustomForImageClassification.from_pretrained(tmp_path)
    assert state["total_flos"] == pytest.approx(6 * 3 * 32 * count_flops(model, (8, 8), 32))
    assert (tmp_path / "recipe.yaml").exists()
    assert (tmp_path / "training_curves.png").stat().st_size > 10_000


def test_tensorboard_is_told(tmp_path, monkeypatch):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    argv = [*SHORT.split(), "--output_dir", str(tmp_path / "out"), "--report_to", "tensorboard"]
    finetune(argv)
    events = reader.EventAccumulator(str(next((tmp_path / "board").rglob("events*")).parent)).Reload()
    assert {"train/loss", "train/images_per_second", "train/mfu", "train/eta_seconds"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6]


@pytest.mark.slow
def test_trackio_is_told(tmp_path):
    pytest.importorskip("trackio")
    argv = [*SHORT.split(), "--output_dir", str(tmp_path / "out"), "--report_to", "trackio", "--project", "digits"]
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}
    subprocess.run([sys.executable, "-m", "trainers.finetune", *argv], env=environment, check=True, timeout=240)
    with sqlite3.connect(next((tmp_path / "trackio").glob("digits*.db"))) as database:
        logged = "\n".join(map(str, database.execute("select metrics from metrics")))
    assert "train/images_per_second" in logged
    assert "train/loss" in logged


def test_a_tracker_that_is_missing_is_one_line(tmp_path, monkeypatch, capsys):
    for name in ("trackio", "tensorboard", "tensorboardX", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as ended:
        finetune([*SHORT.split(), "--output_dir", str(tmp_path), "--report_to", "wandb"])
    assert ended.value.code == 2
    assert "wandb" in capsys.readouterr().err.strip().splitlines()[-1]
