"""Examples as a grain pipeline: shuffled by seed and epoch, shared out, with a position to save."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import grain.python as grain

from ais_jax import child


class Batches:
    """An endless iterator of lists of examples.

    A batch depends on the seed and its number alone. Its number is all there is to save, and it
    may be restored with another number of processes or workers.
    """

    def __init__(self, dataset: grain.MapDataset, workers: int):
        """Starts at the first batch of `dataset`; `workers` processes prepare batches."""
        self._dataset = dataset
        self._workers = workers
        self._number = 0
        self._ahead: grain.DatasetIterator | None = None

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> list[dict]:
        if self._workers == 0:
            batch = self._dataset[self._number]
        else:
            if self._ahead is None:
                self._ahead = _read_ahead(self._dataset, self._number, self._workers)
            batch = next(self._ahead)
        self._number += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """The position, for `set_state`; JSON can hold it."""
        return {"next_index": self._number}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on where `get_state` was called."""
        self.close()
        self._number = int(state["next_index"])

    def close(self) -> None:
        """Ends the workers, if there are any; a further batch would start them again."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


def batches(
    examples: Sequence[dict],
    batch_size: int,
    seed: int,
    *,
    part: int = 0,
    parts: int = 1,
    workers: int = 0,
) -> Batches:
    """Batches of `batch_size` examples, of which this process takes its share.

    Every epoch is shuffled anew. The order of examples does not depend on `parts`: the shares of
    all parts, one after the other, are the batch that one process would take.

    Args:
      examples: problems; of each batch only the own share is read.
      batch_size: of all parts together.
      seed: of the order.
      part: which share, from 0.
      parts: how many there are.
      workers: processes that read ahead; 0 reads when a batch is asked for. Examples in memory are
        there at once: workers pay where reading one costs something.

    Raises:
      ValueError: `batch_size` cannot be shared out evenly.
    """
    if batch_size % parts:
        raise ValueError(f"batch_size={batch_size} is not divisible by {parts} parts")
    dataset = (
        grain.MapDataset.range(len(examples))
        .seed(seed)
        .shuffle()
        .repeat()
        .batch(batch_size, batch_fn=list)
        .map(functools.partial(_read, examples, part, parts))
    )
    return Batches(dataset, workers)


def _read(examples: Sequence[dict], part: int, parts: int, indices: list[int]) -> list[dict]:
    size = len(indices) // parts
    return [examples[i] for i in indices[part * size : (part + 1) * size]]


def _read_ahead(dataset: grain.MapDataset, start: int, workers: int) -> grain.DatasetIterator:
    from absl import flags

    # grain reads absl's flags, which nobody parses here.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    rest = dataset.slice(slice(start, None)).to_iter_dataset(read)
    options = grain.MultiprocessingOptions(num_workers=workers)
    return iter(rest.mp_prefetch(options, functools.partial(_begin_worker, os.getpid())))


def _begin_worker(parent: int, index: int, count: int) -> None:
    child.live_with(parent)
