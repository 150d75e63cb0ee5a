"""Endless streams of encoded images, cut into batches that a resumed run finds again."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from datasets.utils import tqdm


FILE = "stream_{}.json"  # in a checkpoint, of each process
KEPT_POSITIONS = 4096  # batches that a data loader may be ahead
MAX_ROWS = 2**40  # of a pass, as far as the numbers of images go


class Position(NamedTuple):
    """Where a process is in its stream."""

    epoch: int = 0  # passes before this one
    row: int = 0  # images of this one that were read


class StreamBatches:
    """A process's batches of a stream that starts again, in another order, whenever it ends.

    They hold encoded images, which the data loader's workers decode: so their order does not depend on the workers, and
    what was seen already is passed without decoding it. Processes take whole shards each where they can be divided
    evenly, else all of them read the stream and each keeps its share; no image comes twice in a pass.

    Args:
        stream: Rows; shuffled anew by `set_epoch`.
        batch_size: Images in a batch.
        rank, world: The number of this process, and how many there are.
    """

    def __init__(self, stream: IterableDataset, batch_size: int, rank: int = 0, world: int = 1):
        self.stream = split_dataset_by_node(stream, rank, world) if world > 1 else stream
        self.batch_size, self.rank, self.world = batch_size, rank, world
        self.start, self.taken, self.positions = Position(), 0, {0: Position()}

    def save(self, folder: str | Path, batches: int) -> None:
        """Keep where the stream goes on after that many batches; the data loader is ahead of that."""
        saved = {"world": self.world, **self.positions[batches]._asdict()}
        Path(folder, FILE.format(self.rank)).write_text(json.dumps(saved) + "\n", encoding="utf-8")

    def load(self, folder: str | Path, batches: int) -> None:
        """Go on where `save` was told: as many batches come empty before, to be skipped.

        Of another number of processes the first one's place counts, and the order is another one from there on.

        Raises:
            ValueError: if nothing was kept there.
        """
        try:
            saved = json.loads(Path(folder, FILE.format(0)).read_text(encoding="utf-8"))
            if saved["world"] == self.world:
                saved = json.loads(Path(folder, FILE.format(self.rank)).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{str(folder)!r} does not say where its stream goes on") from None
        if saved["world"] != self.world and self.rank == 0:
            print(
                f"The stream was read by {saved['world']} processes and is by {self.world} now: it goes on at about "
                "the same place, in another order."
            )
        self.start = Position(saved["epoch"], saved["row"] * saved["world"] // self.world)
        self.taken, self.positions = batches, {batches: self.start}

    def __iter__(self) -> Iterator[list[tuple[int, dict]]]:
        for _ in range(self.taken):
            yield []
        rows, batches = self._read(), self.taken
        while batch := list(islice(rows, self.batch_size)):
            batches += 1
            (epoch, row), _ = batch[-1]
            self.positions[batches] = Position(epoch, row + 1)
            self.positions.pop(batches - KEPT_POSITIONS, None)
            yield [((epoch * MAX_ROWS + row) * self.world + self.rank, example) for (epoch, row), example in batch]

    def _read(self) -> Iterator[tuple[Position, dict]]:
        epoch, row = self.start
        while True:
            self.stream.set_epoch(epoch)
            rows = iter(self.stream)
            for _ in tqdm(range(row), desc="Passing what was seen", leave=False, disable=row == 0):
                next(rows, None)
            for example in rows:
                yield Position(epoch, row), example
                row += 1
            if row == 0:
                return  # it would never give anything
            epoch, row = epoch + 1, 0
