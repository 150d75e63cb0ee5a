"""One process, several and accumulated batches: how far apart the weights are in which the same run ends.

Every setting is trained on the same batches of 32 images, by one process at once and otherwise divided. The last batch
of an epoch is smaller. Stochastic depth is off: each process draws for itself what its model drops.

Example:
    python tests/benchmarks/ranks.py --output ranks.md
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm


# The folder above holds this package; so the file runs as a script and as a module alike.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.arguments import add_output
from benchmarks.environment import describe_environment, format_environment
from modeling_vit_custom.command_line import positive


ROOT = Path(__file__).resolve().parents[2]
SHARED = (
    "--dataset digits --model vit_nano_patch2_8 --save_strategy no --eval_strategy no --disable_tqdm true "
    "--card_images 0 --use_cpu true"
)
AUGMENTATION = "--min_crop 0.5 --rotation 10 --erasing 0.25 --auto_augment rand-m9-mstd0.5-inc1"
SETTINGS = {
    "plain, SGD": "--optimizer sgd --learning_rate 0.05",
    "plain, AdamW": "--learning_rate 1e-3",
    "augmentation, mixing, EMA, SGD": f"{AUGMENTATION} --mixup 0.8 --cutmix 1.0 --ema_decay 0.99 --optimizer sgd "
    "--learning_rate 0.05",
    "augmentation, mixing, EMA, AdamW": f"{AUGMENTATION} --mixup 0.8 --cutmix 1.0 --ema_decay 0.99 "
    "--learning_rate 1e-3",
    "distillation, repeated augmentation, SGD": f"{AUGMENTATION} --teacher TEACHER --distillation soft "
    "--repeated_augmentation 3 --optimizer sgd --learning_rate 0.05",
}
# Processes, images of each at once, batches accumulated.
DIVISIONS = [(1, 32, 1), (1, 8, 4), (2, 16, 1), (2, 4, 4)]


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    divided = [name_division(*division) for division in DIVISIONS[1:]]
    lines = [
        "# The same run, divided",
        "",
        format_environment(describe_environment("ranks.py", argv, "cpu")),
        f"- a run: {arguments.steps} steps of 32 images, 45 to an epoch, the last of these of 29; one thread a process",
        "",
        "Largest difference of a weight from one process with 32 images at once, and how far training moved them.",
        "",
        f"| setting | {' | '.join(divided)} | moved by |",
        f"|---|{'---|' * (len(divided) + 1)}",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(folder / "teacher", "--learning_rate 1e-3", arguments.steps, (1, 32, 1))
        start = run(folder / "start", "--learning_rate 1e-12 --optimizer sgd", 1, (1, 32, 1))
        for title, options in tqdm(SETTINGS.items(), unit="setting"):
            options = options.replace("TEACHER", str(folder / "teacher"))
            whole, *others = (
                run(folder / f"{title} {number}", options, arguments.steps, division)
                for number, division in enumerate(DIVISIONS)
            )
            apart = [f"{distance(whole, other):.1e}" for other in others]
            lines.append(f"| {title} | {' | '.join(apart)} | {distance(whole, start):.2g} |")
            print(lines[-1], flush=True)
    if arguments.output:
        arguments.output.write_text("\n".join([*lines, ""]), encoding="utf-8")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=90, metavar="N", help="of a run (90, two epochs)")
    add_output(parser, "table to write")
    return parser.parse_args(argv)


def name_division(processes: int, images: int, batches: int) -> str:
    accumulated = f" x {batches} accumulated" if batches > 1 else ""
    return f"{processes} process{'es' if processes > 1 else ''} x {images}{accumulated}"


def run(folder: Path, options: str, steps: int, division: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """The weights that a run ends in."""
    processes, images, batches = division
    words = f"{SHARED} {options} --max_steps {steps} --output_dir".split()
    words += [str(folder), f"--per_device_train_batch_size={images}", f"--gradient_accumulation_steps={batches}"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    launcher = torchrun if processes > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, "-m", "trainers.finetune", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return load_file(folder / "model.safetensors")


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


if __name__ == "__main__":
    main()
