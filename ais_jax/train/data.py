"""Examples as a grain pipeline: shuffled by seed and epoch, with a state that can be saved."""

from __future__ import annotations

from collections.abc import Sequence

import grain.python as grain


def batches(examples: Sequence[dict], batch_size: int, seed: int) -> grain.DatasetIterator:
    """An endless iterator of lists of `batch_size` examples.

    Every epoch is shuffled anew; `get_state` and `set_state` save and restore the position.
    """
    dataset = (
        grain.MapDataset.source(examples)
        .seed(seed)
        .shuffle()
        .repeat()
        .batch(batch_size, batch_fn=list)
    )
    # The examples are in memory: reader threads would only cost their start.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
