"""Many visitors of the demo at once: how long each waits, what fails, and whether the server's memory grows.

Each visitor uploads an example image, asks for its classes twice, for what they rest on once, and for a comparison of
two sizes once, each as soon as there is an answer, over and over. Visitors and server share this machine.

Example:
    python tests/benchmarks/load.py --users 32 --seconds 60 --output load.md
"""

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from itertools import cycle
from pathlib import Path

import numpy as np
from gradio_client import Client, handle_file
from tqdm import tqdm


# The folder above holds this package; so the file runs as a script and as a module alike.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.arguments import add_output
from benchmarks.environment import describe_environment, format_environment
from modeling_vit_custom.command_line import positive


ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "spaces" / "examples").glob("*.png"))
REQUESTS = {
    "/classify": (5,),
    "/explain": ("Grad-CAM", "the most likely class", 1, 0),
    "/compare": ("cifar10_vit", 1.0, "cifar10_vit", 1.5),
}
KINDS = ("/classify", "/classify", "/explain", "/compare")


class Visitor(threading.Thread):
    """One who asks until the time is over, and notes how long each answer took: (kind, seconds, error)."""

    def __init__(self, url: str, number: int, until: threading.Event):
        super().__init__(daemon=True)
        self.client = Client(url, verbose=False, analytics_enabled=False, download_files=False)
        self.draw, self.until, self.noted = random.Random(number), until, []

    def run(self):
        for kind in cycle(KINDS):
            if self.until.is_set():
                return
            start, error = time.perf_counter(), None
            try:
                self.client.predict(handle_file(self.draw.choice(EXAMPLES)), *REQUESTS[kind], api_name=kind)
            except Exception as problem:  # whatever it is, it is counted
                error = f"{type(problem).__name__}: {problem}"
            self.noted.append((kind, time.perf_counter() - start, error))


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    with tempfile.TemporaryDirectory() as uploads:
        process, url = start_demo(uploads)
        try:
            visits, memory = visit(url, process.pid, arguments.users, arguments.seconds)
        finally:
            process.terminate()
            process.communicate(timeout=60)
    environment = describe_environment("load.py", sys.argv[1:] if argv is None else argv, "cpu")
    report = f"{format_environment(environment)}\n\n{describe(visits, memory, arguments)}"
    print(report)
    if arguments.output:
        arguments.output.write_text(f"# Visitors of the demo\n\n{report}\n", encoding="utf-8")
        rows = [{"kind": kind, "seconds": seconds, "error": error} for kind, seconds, error in visits]
        raw = {"environment": environment, "memory_mib": memory, "visits": rows}
        arguments.output.with_suffix(".json").write_text(json.dumps(raw) + "\n", encoding="utf-8")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=positive, default=32, metavar="N", help="visitors at once (32)")
    parser.add_argument("--seconds", type=positive, default=60, metavar="N", help="how long they ask (60)")
    add_output(parser, "write the table to FILE, and every visit beside it as JSON")
    return parser.parse_args(argv)


def start_demo(uploads: str) -> tuple[subprocess.Popen, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GRADIO_TEMP_DIR": uploads}
    command = [sys.executable, str(ROOT / "spaces" / "app.py"), "--port", str(port)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        time.sleep(0.2)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process, f"http://127.0.0.1:{port}"
    raise SystemExit("load.py: error: the demo did not start: run `python spaces/app.py` to see why")


def visit(url: str, server: int, users: int, seconds: int) -> tuple[list[tuple], list[float]]:
    """All visits, and the server's memory in MiB second by second."""
    over, memory = threading.Event(), []
    visitors = [Visitor(url, number, over) for number in tqdm(range(users), desc="Opening the page")]
    for visitor in visitors:
        visitor.start()
    for _ in tqdm(range(seconds), desc="Asking", unit="s"):
        time.sleep(1)
        memory.append(read_memory(server))
    over.set()
    for visitor in visitors:
        visitor.join(timeout=120)
    return [noted for visitor in visitors for noted in visitor.noted], memory


def read_memory(process: int) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def describe(visits: list[tuple], memory: list[float], arguments: argparse.Namespace) -> str:
    rows = ["| asked for | answers | errors | median | 95th percentile | longest |", "|---|---:|---:|---:|---:|---:|"]
    for kind in REQUESTS:
        times = [seconds for asked, seconds, error in visits if asked == kind and error is None]
        errors = sum(asked == kind and error is not None for asked, _, error in visits)
        figures = [f"{each:.2f} s" for each in np.percentile(times, [50, 95, 100])] if times else ["-"] * 3
        rows.append(f"| `{kind}` | {len(times):,} | {errors} | {' | '.join(figures)} |")
    third = max(1, len(memory) // 3)
    early, late = np.mean(memory[third : 2 * third]), np.mean(memory[-third:])
    rows.append(
        f"\n{arguments.users} visitors for {arguments.seconds} s. Memory of the server: {early:,.0f} MiB in the second"
        f" third of that time, {late:,.0f} MiB in the last."
    )
    problems = sorted({error for *_, error in visits if error is not None})
    return "\n".join([*rows, *(f"\n- {problem}" for problem in problems)])


if __name__ == "__main__":
    main()
