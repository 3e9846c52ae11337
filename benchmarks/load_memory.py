"""Peak memory and time of reading a published checkpoint and of writing it back.

    python benchmarks/load_memory.py Qwen3-8B --folder /tmp/checkpoint

Writes a checkpoint of random bfloat16 weights in the named model's shapes, unless the folder is
there already, then reads it in a fresh process and prints that process's peak resident memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import pathlib
import resource
import time

import ml_dtypes
import numpy as np


def generate(name: str, folder: pathlib.Path) -> None:
    from ais_jax.models import build
    from ais_jax.models.checkpoint import leaf, tensors_of
    from ais_jax.models.model import family
    from ais_jax.models.pretrained import SHARD_BYTES, new_folder
    from ais_jax.models.published import PUBLISHED
    from ais_jax.models.safetensors_io import Output, write_folder, write_json

    config = PUBLISHED[name]
    params = build(config).abstract_params()
    rng = np.random.default_rng(0)
    noise = (rng.standard_normal(2**20) * 0.02).astype(ml_dtypes.bfloat16)
    dtype = np.dtype(ml_dtypes.bfloat16)
    outputs = []
    for tensor in tensors_of(config):
        shape = tensor.stored_shape(leaf(params, tensor.path).shape)
        outputs.append(Output(tensor.name, dtype, shape, lambda s=shape: np.resize(noise, s)))
    with new_folder(folder) as partial:
        write_json(partial / "config.json", family(config).to_hf(config))
        write_folder(partial, outputs, SHARD_BYTES)


def measure(folder: pathlib.Path, copy: pathlib.Path | None, report) -> None:
    import jax

    from ais_jax.models import from_pretrained, save_pretrained
    from ais_jax.quantize import bytes_of

    before = _peak()
    began = time.perf_counter()
    model = from_pretrained(folder)
    loaded = time.perf_counter()
    size = bytes_of(model.params)
    result = {
        "parameters": sum(x.size for x in jax.tree.leaves(model.params)),
        "bytes": size,
        "peak before": before,
        "peak": _peak(),
        "read seconds": loaded - began,
    }
    if copy is not None:
        save_pretrained(model, model.params, copy)
        result["peak after writing"] = _peak()
        result["write seconds"] = time.perf_counter() - loaded
    report.send(result)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a published name, such as Qwen3-8B")
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--copy", type=pathlib.Path, help="write it back to here")
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")  # a fresh process has a fresh peak
    if not args.folder.exists():
        writer = spawn.Process(target=generate, args=(args.model, args.folder))
        writer.start()
        writer.join()
    receive, send = spawn.Pipe()
    reader = spawn.Process(target=measure, args=(args.folder, args.copy, send))
    reader.start()
    result = receive.recv()
    reader.join()
    for name, value in result.items():
        print(f"{name:>20}: {value:,.1f}" if isinstance(value, float) else f"{name:>20}: {value:,}")
    print(f"{'peak / bytes':>20}: {result['peak'] / result['bytes']:.3f}")


if __name__ == "__main__":
    main()
