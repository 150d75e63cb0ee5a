"""Runs that are told to stop, that lose a process, and that go on with another number of them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file

from trainers.finetune import main as finetune
from trainers.runs import is_whole, last_checkpoint
from trainers.vit_trainer import ViTTrainer


ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "trainers" / "launch"
OPTIONS = (
    "--dataset digits --model vit_nano_patch2_8 --config_overrides drop_path_rate=0.1 --min_crop 0.5 --mixup 0.8 "
    "--ema_decay 0.9 --eval_strategy no --logging_steps 1 --disable_tqdm true --card_images 0 --use_cpu true "
    "--per_device_train_batch_size 16 --dataloader_num_workers 1"
)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
FINETUNE = ["-m", "trainers.finetune"]


@contextmanager
def started(command: list[str], log: Path, **options) -> Iterator[subprocess.Popen]:
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, **{"env": ENVIRONMENT, **options}
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def wait_for_step(process: subprocess.Popen, log: Path, step: int) -> None:
    deadline = time.monotonic() + 240
    while not re.search(rf"^step {step}/", log.read_text(), re.MULTILINE):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in load_file(folder / "model.safetensors").values()])


def test_a_run_that_is_told_to_stop_saves_and_goes_on_by_the_same_command(tmp_path, capsys):
    argv, log = [*OPTIONS.split(), "--max_steps", "150", "--save_strategy", "no"], tmp_path / "log"
    with started([sys.executable, *FINETUNE, *argv, "--output_dir", str(tmp_path / "told")], log) as process:
        wait_for_step(process, log, 20)
        os.killpg(process.pid, signal.SIGTERM)  # its workers hear of it as well
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    (checkpoint,) = (tmp_path / "told").glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 20 <= step < 150
    assert is_whole(checkpoint)
    message = f"finetune: told to stop (SIGTERM) at step {step}: {checkpoint} is complete: the same command goes on"
    assert message in log.read_text()
    assert "Traceback" not in log.read_text()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as before: sums have an order
    try:
        finetune([*argv, "--output_dir", str(tmp_path / "told")])
        assert f"Going on from {checkpoint}" in capsys.readouterr().out
        finetune([*argv, "--output_dir", str(tmp_path / "whole")])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(weights(tmp_path / "told"), weights(tmp_path / "whole"))


def test_an_evaluation_that_was_due_when_a_run_was_told_to_stop_is_made_up_for(tmp_path, monkeypatch):
    argv = [*OPTIONS.split(), "--max_steps", "12", "--eval_strategy", "steps", "--eval_steps", "4"]
    argv += ["--save_strategy", "steps", "--save_steps", "4", "--load_best_model_at_end", "true"]
    finetune([*argv, "--output_dir", str(tmp_path / "whole")])
    train, steps = ViTTrainer.training_step, {4, 12}

    def tell(self, *args, **kwargs):
        step = self.state.global_step + 1
        if step in steps:
            steps.remove(step)
            os.kill(os.getpid(), signal.SIGTERM)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(ViTTrainer, "training_step", tell)
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            finetune([*argv, "--output_dir", str(tmp_path / "told")])
        assert stop.value.code == 128 + signal.SIGTERM
    finetune([*argv, "--output_dir", str(tmp_path / "told")])
    whole, told = (json.loads((tmp_path / name / "trainer_state.json").read_text()) for name in ("whole", "told"))
    expected, found = (
        [(row["step"], row["eval_loss"]) for row in each["log_history"] if "eval_loss" in row] for each in (whole, told)
    )
    assert [step for step, _ in expected] == [4, 8, 12]
    assert found == expected
    assert told["best_global_step"] == whole["best_global_step"]
    assert told["best_metric"] == whole["best_metric"]


def test_the_log_of_a_run_that_went_on_is_that_of_one_that_never_stopped(tmp_path, monkeypatch):
    argv = [
        *OPTIONS.split(),
        "--max_steps",
        "9",
        "--save_strategy",
        "steps",
        "--save_steps",
        "4",
        "--logging_steps",
        "3",
    ]
    finetune([*argv, "--output_dir", str(tmp_path / "whole")])
    step = ViTTrainer.training_step

    def die(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(ViTTrainer, "training_step", die)
        finetune([*argv, "--output_dir", str(tmp_path / "gone_on")])
    finetune([*argv, "--output_dir", str(tmp_path / "gone_on")])
    logs = []
    for name in ("whole", "gone_on"):
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        logs.append([(row["step"], row.get("loss"), row.get("train_loss")) for row in history])
    assert [row[0] for row in logs[0]] == [3, 6, 9, 9]
    assert logs[0] == logs[1]


def test_a_damaged_checkpoint_is_passed_by(tmp_path, capsys):
    argv = [*OPTIONS.split(), "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "1"]
    argv += ["--save_total_limit", "4", "--output_dir", str(tmp_path)]
    finetune(argv)
    (tmp_path / "run.json").unlink()
    for step, file in ((4, "model.safetensors"), (3, "optimizer.pt")):
        os.truncate(tmp_path / f"checkpoint-{step}" / file, 1000)
    capsys.readouterr()
    finetune(argv)
    printed = capsys.readouterr().out
    assert f"{tmp_path}/checkpoint-4 is not whole" in printed
    assert f"Going on from {tmp_path}/checkpoint-2" in printed


@pytest.mark.parametrize("name", ["README.md", "config.json"])
def test_what_somebody_else_put_into_the_folder_stays(tmp_path, capsys, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(SystemExit):
        finetune([*OPTIONS.split(), "--max_steps", "1", "--output_dir", str(tmp_path)])
    assert "pass --overwrite true or another one" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "mine"


def test_a_run_that_was_killed_before_it_said_that_it_was_finished_starts_again(tmp_path, capsys):
    argv = [*OPTIONS.split(), "--max_steps", "2", "--save_strategy", "no", "--output_dir", str(tmp_path)]
    finetune(argv)
    (tmp_path / "run.json").unlink()
    with pytest.raises(SystemExit):
        finetune([*argv, "--max_steps", "3"])
    assert "already holds a model" in capsys.readouterr().err
    finetune(argv)
    assert (tmp_path / "run.json").exists()


# Steps that are the same however they are divided: nothing is drawn by a process for itself.
DIVISIBLE = ["--optimizer", "sgd", "--learning_rate", "0.05", "--config_overrides", "drop_path_rate=0.0"]


@pytest.mark.slow
def test_a_run_that_loses_a_process_says_so_and_goes_on_with_one(tmp_path, capsys):
    argv = [*OPTIONS.split(), *DIVISIBLE, "--num_train_epochs", "2", "--save_strategy", "steps", "--save_steps", "10"]
    command, log = [*FINETUNE, *argv, "--output_dir", str(tmp_path / "run")], tmp_path / "log"
    with started([*TORCHRUN, *command], log) as process:
        wait_for_step(process, log, 15)
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert process.wait(timeout=120) != 0
    lost = r"^finetune: error: lost another process of the run at step \d+.*$"
    said = re.search(lost, log.read_text(), re.MULTILINE)
    checkpoint = last_checkpoint(tmp_path / "run")
    assert f"{checkpoint} is complete: the same command goes on from there" in said[0]
    alone = subprocess.run([sys.executable, *command], env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert alone.returncode == 0, alone.stderr
    assert f"Going on from {checkpoint}" in alone.stdout
    assert "32 images a step as before: 16 x 2 accumulated on each of 1 processes" in alone.stdout
    finetune([*argv, "--output_dir", str(tmp_path / "whole"), "--per_device_train_batch_size", "32"])
    torch.testing.assert_close(weights(tmp_path / "run"), weights(tmp_path / "whole"), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_two_processes_go_on_where_one_was_told_to_stop(tmp_path):
    argv, log = [*OPTIONS.split(), *DIVISIBLE, "--num_train_epochs", "1"], tmp_path / "log"
    command = [*FINETUNE, *argv, "--output_dir", str(tmp_path / "run")]
    with started([sys.executable, *command], log) as process:
        wait_for_step(process, log, 10)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    both = subprocess.run([*TORCHRUN, *command], env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert both.returncode == 0, both.stderr
    assert "16 images a step as before: 8 on each of 2 processes" in both.stdout
    finetune([*argv, "--output_dir", str(tmp_path / "whole")])
    torch.testing.assert_close(weights(tmp_path / "run"), weights(tmp_path / "whole"), rtol=0, atol=1e-5)


def test_another_number_of_images_a_step_is_refused(tmp_path, capsys):
    argv = [*OPTIONS.split(), "--save_strategy", "steps", "--save_steps", "2", "--output_dir", str(tmp_path)]
    finetune([*argv, "--max_steps", "2"])
    with pytest.raises(SystemExit):
        finetune(
            [*argv, *["--max_steps", "4", "--resume_from_checkpoint", "true", "--per_device_train_batch_size", "10"]]
        )
    assert "is of a run with 16 images a step, and now there are 10: choose" in capsys.readouterr().err


DEATH = """
import os, shutil, signal, sys
import torch
from transformers import TrainerState
import safetensors.torch
from trainers import ema
from trainers.finetune import main

where, when = {where!r}, {when}

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def write_half(state, path):
    save(state, path)
    os.truncate(path, os.path.getsize(path) // 2)
    die()

def delete_half(folder, *_, **__):
    entries = list(os.scandir(folder))
    for entry in entries[: len(entries) // 2]:
        os.unlink(entry.path)
    die()

def at(number, function, instead):
    counted = [0]
    def call(*args, **kwargs):
        counted[0] += 1
        return (instead if counted[0] == number else function)(*args, **kwargs)
    return call

save = TrainerState.save_to_json
if where == "state":
    TrainerState.save_to_json = at(when, save, write_half)
elif where == "optimizer":
    torch.save = at(when, torch.save, die)
elif where == "averages":
    ema.save_file = at(when, ema.save_file, die)
elif where == "deletion":
    shutil.rmtree = at(when, shutil.rmtree, delete_half)
main({argv!r})
"""
DYING = ["--max_steps", "12", "--save_strategy", "steps", "--save_steps", "3", "--save_total_limit", "1"]


@pytest.fixture(scope="module")
def whole_weights(tmp_path_factory) -> torch.Tensor:
    folder = tmp_path_factory.mktemp("whole")
    subprocess.run(
        [sys.executable, *FINETUNE, *OPTIONS.split(), *DYING, "--output_dir", str(folder)], env=ENVIRONMENT, check=True
    )
    return weights(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "when"), [("state", 2), ("optimizer", 6), ("averages", 3), ("deletion", 1), ("deletion", 2)]
)
def test_death_while_a_checkpoint_is_written_or_deleted_costs_nothing(tmp_path, whole_weights, where, when):
    folder = tmp_path / "run"
    argv = [*OPTIONS.split(), *DYING, "--output_dir", str(folder)]
    code = DEATH.format(where=where, when=when, argv=argv)
    died = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert died.returncode == -signal.SIGKILL, died.stderr
    whole = last_checkpoint(folder)
    assert whole is not None
    done = subprocess.run(
        [sys.executable, *FINETUNE, *argv], env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert f"Going on from {whole}" in done.stdout
    assert torch.equal(weights(folder), whole_weights)


@pytest.mark.slow
def test_a_slurm_job_saves_and_is_queued_again(tmp_path):
    """With a Slurm that starts its one task here, and writes down what it is asked for."""
    for name, body in {
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"',
        "scontrol": f'if [ "$1" = show ]; then echo localhost; else echo "$@" >> {tmp_path}/asked; fi',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    given = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2"}
    environment = ENVIRONMENT | given | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    argv = [*FINETUNE, *OPTIONS.split(), "--max_steps", "400", "--output_dir", str(tmp_path / "run")]
    command, log = ["bash", str(LAUNCH / "slurm.sh"), *argv], tmp_path / "log"
    with started(command, log, env=environment) as process:
        wait_for_step(process, log, 10)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, log.read_text()
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    assert is_whole(Path(last_checkpoint(tmp_path / "run")))


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_accelerate_reads_the_ready_configurations(name):
    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
    assert config.num_processes == 8
    assert config.distributed_type == {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}[name]


def test_options_of_sharding_are_known():
    options = yaml.safe_load((LAUNCH / "fsdp2.yaml").read_text())["fsdp_config"]
    known = FullyShardedDataParallelPlugin.__dataclass_fields__
    assert {name.removeprefix("fsdp_") for name in options} - {"version"} <= known.keys()


@pytest.mark.slow
def test_accelerate_launches_the_script(tmp_path):
    argv = [*FINETUNE, *OPTIONS.split(), "--max_steps", "4", "--output_dir", str(tmp_path / "run")]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / "ddp.yaml")]
    # Without GPUs this is what makes it start processes at all.
    environment = ENVIRONMENT | {"ACCELERATE_USE_CPU": "1"}
    command = [*launcher, "--multi_gpu", "--num_processes", "2", *argv]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["command"].startswith("torchrun --nproc_per_node 2 ")


@pytest.mark.slow
def test_processes_that_would_train_alone_are_refused(tmp_path):
    argv = [
        *FINETUNE,
        *OPTIONS.split(),
        "--max_steps",
        "4",
        "--output_dir",
        str(tmp_path / "run"),
        "--use_cpu",
        "false",
    ]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / "ddp.yaml")]
    environment = ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, "--num_processes", "2", *argv]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    assert "finetune: error: 2 processes were started, and each would train alone" in done.stderr
    assert not (tmp_path / "run").exists()


SHARDED = """
import sys
sys.path.insert(0, {tests!r})
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from tiny_models import random_images, tiny_model
from modeling_vit_custom import ViTCustomForImageClassification
from trainers.ema import Ema, join

torch.distributed.init_process_group("gloo")
mesh = torch.distributed.init_device_mesh("cpu", (2,))
options = {{"head_batch_norm": True}}  # whose running statistics are not divided
plain, model = (tiny_model(ViTCustomForImageClassification, {architecture!r}, **options).train() for _ in range(2))
images, labels = random_images(4), torch.tensor([0, 1, 2, 3])
averages = [Ema(each, 0.9) for each in (plain, model)]
blocks = [each for each in model.modules() if type(each).__name__ in model._no_split_modules]
assert blocks
for block in blocks:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
averages[1].distribute(model)
whole = {{name for name, each in averages[1].averages.items() if not isinstance(each, DTensor)}}
assert whole and all(".running_" in name for name in whole)
for _ in range(3):
    for each, average in zip((plain, model), averages):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        each(images, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(each)
rank = torch.distributed.get_rank()
averages[1].save({folder!r}, writes=rank == 0)
torch.distributed.barrier()
averages[1].update(model)
averages[1].load({folder!r})
for name, expected in averages[0].averages.items():
    torch.testing.assert_close(join(averages[1].averages[name]), expected, rtol=0, atol=1e-5)
plain.eval(), model.eval()
with averages[0].in_place(plain), averages[1].in_place(model), torch.no_grad():
    torch.testing.assert_close(model(images).logits, plain(images).logits, rtol=0, atol=1e-4)
assert averages[1].steps == 3
# Each process knows its own images: what is evaluated and saved is the mean.
statistic = averages[0].statistics[0]
averages[0].averages[statistic].fill_(rank)
with averages[0].in_place(plain):
    torch.testing.assert_close(plain.get_buffer(statistic), torch.full_like(plain.get_buffer(statistic), 0.5))
"""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["vit", "swin"])
def test_averages_of_sharded_weights_are_those_of_whole_ones(tmp_path, architecture):
    script = tmp_path / "script.py"
    code = SHARDED.format(tests=str(Path(__file__).parent), folder=str(tmp_path), architecture=architecture)
    script.write_text(code)
    done = subprocess.run([*TORCHRUN, str(script)], env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
