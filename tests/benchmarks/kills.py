"""Runs that are killed again and again end in the weights of one that never was.

Each setting is trained twice by the same command: once to the end, and once with SIGKILL to all of its processes at
random steps, after each of which the command is given again. The weights are compared bit for bit.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from modeling_vit_custom.command_line import positive
from trainers.data import TRAIN, load_digits


# The folder above holds this package; so the file runs as a script and as a module alike.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.arguments import add_output
from benchmarks.environment import describe_environment, format_environment


ROOT = Path(__file__).resolve().parents[2]
SHARED = (
    "--dataset digits --model vit_nano_patch2_8 --config_overrides drop_path_rate=0.1 --learning_rate 1e-3 "
    "--per_device_train_batch_size 32 --save_strategy steps --save_steps 7 --eval_strategy steps --eval_steps 30 "
    "--logging_steps 1 --disable_tqdm true --card_images 0 --use_cpu true "
    "--min_crop 0.5 --rotation 10 --erasing 0.25"
)
# Each with its number of processes. TEACHER and STREAM are made first.
SETTINGS = {
    "plain": ("", 1),
    "mixing, EMA, repeated augmentation, all of it in two workers": (
        "--mixup 0.8 --cutmix 1.0 --ema_decay 0.99 --repeated_augmentation 3 --augment_on_device false "
        "--dataloader_num_workers 2",
        1,
    ),
    "distillation, mixing": ("--teacher TEACHER --distillation soft --mixup 0.8", 1),
    "two ranks, mixing, EMA": ("--mixup 0.8 --cutmix 1.0 --ema_decay 0.99 --dataloader_num_workers 2", 2),
    "streaming, mixing, EMA": (
        "--mixup 0.8 --ema_decay 0.99 --dataset STREAM --streaming true --shuffle_buffer 500 "
        "--validation_fraction 0 --eval_strategy no --dataloader_num_workers 2",
        1,
    ),
}
STEP = re.compile(r"^step ([\d,]+)/", re.MULTILINE)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    lines = [
        "# Runs killed by SIGKILL",
        "",
        format_environment(describe_environment("kills.py", argv, "cpu")),
        "",
        "Weights of a run killed at these steps and of one that was not, by the same command.",
        "",
        "| setting | killed at steps | tensors that differ | largest difference |",
        "|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        places = {"TEACHER": str(folder / "teacher"), "STREAM": str(folder / "stream")}
        write_stream(folder / "stream")
        run([*SHARED.split(), "--max_steps", "100", "--output_dir", places["TEACHER"]], ranks=1)
        for number in arguments.settings:
            title, (options, ranks) = list(SETTINGS.items())[number]
            words = [*SHARED.split(), "--max_steps", str(arguments.steps), *options.split()]
            lines.append(compare(title, [places.get(word, word) for word in words], ranks, folder, arguments))
            print(lines[-1], flush=True)
    if arguments.output:
        arguments.output.write_text("\n".join([*lines, ""]), encoding="utf-8")
    if not all("| 0 of" in line for line in lines[-len(arguments.settings) :]):
        raise SystemExit("some weights differ")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=positive, default=20, metavar="N", help="of each setting (20)")
    parser.add_argument("--steps", type=positive, default=120, metavar="N", help="of a run (120)")
    parser.add_argument("--seed", type=int, default=0, help="of the steps at which runs are killed (0)")
    parser.add_argument("--settings", nargs="+", type=int, default=range(len(SETTINGS)), help="by number, 0 to 4 (all)")
    add_output(parser, "table to write")
    return parser.parse_args(argv)


def write_stream(folder: Path) -> None:
    """The digits as four parquet files, and some of them to test on."""
    digits = load_digits()[TRAIN]
    folder.mkdir()
    for shard in range(4):
        digits.select(range(1437)).shard(4, shard).to_parquet(folder / f"train-{shard}.parquet")
    digits.select(range(1437, 1797)).to_parquet(folder / "test.parquet")


def launch(argv: list[str], ranks: int, log: IO[str]) -> subprocess.Popen:
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *launcher, "-m", "trainers.finetune", *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def run(argv: list[str], ranks: int, kill_at: int | None = None) -> bool:
    """Whether a run came to its end before it reached the step at which it was to be killed."""
    with tempfile.TemporaryFile("w+") as log:
        process = launch(argv, ranks, log)
        while process.poll() is None:
            time.sleep(0.002)
            log.seek(0)
            steps = STEP.findall(log.read())
            if kill_at is not None and steps and int(steps[-1].replace(",", "")) >= kill_at:
                kill_all(process)
                return False
        log.seek(0)
        if process.returncode:
            raise RuntimeError(f"a run ended with {process.returncode}: {log.read()[-3000:]}")
    return True


def kill_all(process: subprocess.Popen) -> None:
    """The run, or the launcher and its ranks, and their workers: stopped first, so that none outlives another."""
    parent = psutil.Process(process.pid)
    family = [parent, *parent.children(recursive=True)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.suspend()
    for member in {*family, *parent.children(recursive=True)}:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def compare(title: str, argv: list[str], ranks: int, folder: Path, arguments: argparse.Namespace) -> str:
    """A row of the table."""
    generator = random.Random(arguments.seed)
    kills = sorted(generator.sample(range(1, arguments.steps), arguments.kills))
    run([*argv, "--output_dir", str(folder / "whole")], ranks)
    for step in tqdm(kills, desc=title, unit="kill"):
        if run([*argv, "--output_dir", str(folder / "killed")], ranks, step):
            raise RuntimeError(f"the run ended before step {step}")
    run([*argv, "--output_dir", str(folder / "killed")], ranks)
    whole, killed = (load_file(folder / name / "model.safetensors") for name in ("whole", "killed"))
    differing = [name for name in whole if not torch.equal(whole[name], killed[name])]
    largest = max((whole[name] - killed[name]).abs().max().item() for name in whole)
    for name in ("whole", "killed"):
        shutil.rmtree(folder / name)
    listed = ", ".join(map(str, kills))
    return f"| {title} | {listed} | {len(differing)} of {len(whole)} | {largest:g} |"


if __name__ == "__main__":
    main()
