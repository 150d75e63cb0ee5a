"""Predictions that are killed and go on: whether each row is there once, and how much memory many images take.

`python -m trainers.predict` classifies the images of all parquet files in a folder: those of the smallest, to compare
memory; all of them; and all once more, killed with SIGKILL at random moments and started again each time.

Example:
    python tests/benchmarks/prediction.py --data path/to/cifar10 --output prediction.md
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq


# The folder above holds this package; so the file runs as a script and as a module alike.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.arguments import add_output
from benchmarks.environment import describe_environment, format_environment
from modeling_vit_custom.command_line import positive


ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "spaces" / "cifar10_vit"
POLL_SECONDS = 0.2
BLOCK_ROWS = 1024


class Run:
    """One process of the command, watched until it ends or enough rows are done.

    Attributes:
        seconds: It took.
        rows: That were done when it ended.
        main, worker, together: Peaks in MiB: resident memory of the main process, of the largest of its workers, and of
            all of them with shared pages counted once.
        over_time: The main process's resident memory in MiB, by the rows done.
    """

    def __init__(self, images: list[Path], output: Path, workers: int, until: float = float("inf"), delay: float = 0):
        command = [sys.executable, "-m", "trainers.predict", str(MODEL), *map(str, images), "--output", str(output)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.parts, self.main, self.worker, self.together = Path(f"{output}.parts"), 0.0, 0.0, 0.0
        self.over_time: list[tuple[int, float]] = []
        start, reached = time.perf_counter(), None
        with subprocess.Popen(
            [*command, "--num_workers", str(workers)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            while process.poll() is None:
                self.watch(process.pid)
                if reached is None and self.count_rows() >= until:
                    reached = time.perf_counter()
                if reached is not None and time.perf_counter() - reached >= delay:
                    process.send_signal(signal.SIGKILL)
                    break
                time.sleep(POLL_SECONDS)
            process.wait()
            self.seconds, self.status = time.perf_counter() - start, process.returncode
            # Workers of a killed process keep its pipe open for a moment.
            self.printed = process.stdout.read().strip() if self.status == 0 else ""
        self.rows = self.count_rows()

    def count_rows(self) -> int:
        return sum(int(path.name.split("-")[2]) for path in self.parts.glob("part-*.arrow"))

    def watch(self, pid: int) -> None:
        together = 0.0
        children = [child for task in Path(f"/proc/{pid}/task").glob("*/children") for child in read(task).split()]
        for process in [pid, *map(int, children)]:
            peak = read_mib(Path(f"/proc/{process}/status"), "VmHWM")
            together += read_mib(Path(f"/proc/{process}/smaps_rollup"), "Pss")
            if process == pid:
                self.main = max(self.main, peak)
            else:
                self.worker = max(self.worker, peak)
        self.together = max(self.together, together)
        self.over_time.append((self.count_rows(), read_mib(Path(f"/proc/{pid}/status"), "VmRSS")))


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has ended
        return ""


def read_mib(path: Path, name: str) -> float:
    return next((int(line.split()[1]) for line in read(path).splitlines() if line.startswith(f"{name}:")), 0) / 1024


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    files = sorted(arguments.data.glob("*.parquet"), key=lambda file: pq.read_metadata(file).num_rows)
    if len(files) < 2:
        raise SystemExit(f"prediction.py: error: {arguments.data} must hold several parquet files, not {len(files)}")
    environment = describe_environment("prediction.py", sys.argv[1:] if argv is None else argv, "cpu")
    total = sum(pq.read_metadata(file).num_rows for file in files)
    with tempfile.TemporaryDirectory() as folder:
        few = Run(files[:1], Path(folder, "few.jsonl"), arguments.workers)
        whole = Run(files, Path(folder, "whole.jsonl"), arguments.workers)
        for run in (few, whole):
            if run.status != 0:
                raise SystemExit(f"prediction.py: error: a run ended with status {run.status}")
        broken, last = kill(files, Path(folder, "broken.jsonl"), total, whole.seconds, arguments)
        lines = [Path(folder, f"{name}.jsonl").read_bytes().splitlines() for name in ("few", "whole", "broken")]
    report = f"{format_environment(environment)}\n\n{describe(lines, few, whole, broken, last)}"
    print(report)
    if arguments.output:
        arguments.output.write_text(f"# Predictions for many images\n\n{report}\n", encoding="utf-8")
    return int(lines[1] != lines[2] or len(lines[2]) != total)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="with two parquet files of images")
    parser.add_argument("--kills", type=positive, default=5, metavar="N", help="how often it is killed (5)")
    parser.add_argument("--workers", type=positive, default=2, metavar="N", help="processes that read images (2)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments of the kills (0)")
    add_output(parser, "write the figures to FILE")
    return parser.parse_args(argv)


def kill(
    files: list[Path], output: Path, total: int, seconds: float, arguments: argparse.Namespace
) -> tuple[list[Run], Run]:
    """Runs that were killed, each a moment after another random number of rows, and the one that came to the end."""
    draw = random.Random(arguments.seed)
    moments = sorted(draw.uniform(0, total - 4 * BLOCK_ROWS) for _ in range(arguments.kills))
    block_seconds = BLOCK_ROWS * seconds / total
    broken = [Run(files, output, arguments.workers, moment, draw.uniform(0, 2) * block_seconds) for moment in moments]
    return broken, Run(files, output, arguments.workers)


def describe(lines: list[list[bytes]], few: Run, whole: Run, broken: list[Run], last: Run) -> str:
    rows = ["| images | time | main process | largest worker | all, shared pages once |", "|---:|---:|---:|---:|---:|"]
    for run, written in ((few, lines[0]), (whole, lines[1])):
        figures = " | ".join(f"{each:,.0f} MiB" for each in (run.main, run.worker, run.together))
        rows.append(f"| {len(written):,} | {run.seconds:.0f} s | {figures} |")
    sixths = [[] for _ in range(6)]
    for done, resident in whole.over_time:
        if done:  # before that it starts, and behind that the parts are gone
            sixths[min(5, 6 * done // len(lines[1]))].append(resident)
    medians = ", ".join(f"{statistics.median(each):,.0f}" for each in sixths if each)
    rows.append(
        f"\nThese are peaks. The main process's median memory in each sixth of {len(lines[1]):,} images: {medians} MiB."
    )
    statuses = {run.status for run in broken}
    kills = ", ".join(f"{run.rows:,}" for run in broken)
    printed = last.printed.partition(".jsonl: ")[2]
    numbers = [json.loads(line)["row"] for line in lines[2]]
    rows += [
        f"\nKilled {len(broken)} times with SIGKILL (status {', '.join(map(str, statuses))}), with so many rows done: "
        f"{kills}. The last start ended with status {last.status} and printed `{printed}`.",
        f"\n- rows: {len(numbers):,}, of which different numbers: {len(set(numbers)):,}, in order: "
        f"{numbers == list(range(len(numbers)))}",
        f"- the same bytes as of the run that was not killed: {lines[1] == lines[2]}",
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
