"""Published checkpoints in and out: `from_pretrained`, `save_pretrained`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from ais_jax import mesh as mesh_lib
from ais_jax.errors import UserError
from ais_jax.models import naming
from ais_jax.models.checkpoint import (
    ORBAX_PARAMS,
    Checkpoint,
    FolderCheckpoint,
    OrbaxCheckpoint,
    is_exact,
    leaf,
    open_model,
    tensors_of,
)
from ais_jax.models.model import Model, Params, family
from ais_jax.models.safetensors_io import Output, write_folder, write_json
from ais_jax.models.tokenizers import CharTokenizer, save_char_tokenizer

SHARD_BYTES = 5_000_000_000


@dataclasses.dataclass(frozen=True)
class PretrainedModel(Model):
    """A `Model` together with the parameters that were read, and where they came from.

    As a static argument of jit pass `structure`, which holds no arrays.
    """

    params: Params = dataclasses.field(default_factory=dict, repr=False, compare=False)
    checkpoint: Checkpoint | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def structure(self) -> Model:
        """The model without parameters."""
        return Model(self.config, self.dtype, self.remat)


def from_pretrained(
    directory: str | os.PathLike, dtype: str = "bfloat16", mesh: Mesh | None = None
) -> PretrainedModel:
    """Reads a published checkpoint: a Hugging Face folder of safetensors, or a GGUF file.

    Tensors are read one at a time and put straight where they will live, so that memory holds
    little more than the parameters themselves. Tokenizer files are not needed.

    Args:
      directory: the folder or file. Nothing is downloaded.
      dtype: of parameters and activations, "bfloat16" or "float32". A few small parameters that
        the architecture computes with in float32 are not rounded to bfloat16.
      mesh: devices (data, fsdp, tensor) over which the parameters are split; None is one device.

    Raises:
      UserError: a file is missing or damaged, the architecture is unknown, sizes contradict.
    """
    checkpoint, model, tensors = open_model(os.fspath(directory), dtype)
    shardings = shardings_of(model, mesh)
    params = load_params(checkpoint, tensors, model, shardings, dtype)
    return PretrainedModel(model.config, dtype, params=params, checkpoint=checkpoint)


def shardings_of(model: Model, mesh: Mesh | None) -> Any:
    """A sharding for each parameter: by the rules of training, or one device."""
    shapes = model.abstract_params()
    if mesh is None:
        return jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), shapes)
    return mesh_lib.param_shardings(model.param_axes(), shapes, mesh, mesh_lib.TRAIN_RULES)


def load_params(
    checkpoint: Checkpoint,
    tensors: list[naming.Tensor],
    model: Model,
    shardings: Any,
    dtype: str,
) -> Params:
    """Parameters of a checkpoint that has been checked, in `shardings`.

    A parameter that stacks layers is created once, and each layer is written into it in place.
    """
    if isinstance(checkpoint, OrbaxCheckpoint):
        return checkpoint.restore(model, shardings, dtype)
    shapes = model.abstract_params()
    parts: dict[naming.Path, list[naming.Tensor]] = {}
    for tensor in tensors:
        parts.setdefault(tensor.path, []).append(tensor)

    def weight(path):  # the largest tensors come first, while there is room for their copies
        return -leaf(shapes, path).size / len(parts[path])

    flat = {}
    for path in sorted(parts, key=weight):
        as_stored = is_exact(model, path[-1], dtype)
        place = functools.partial(_load_leaf, checkpoint, parts[path], leaf(shapes, path).shape)
        flat[path] = place(leaf(shardings, path), None if as_stored else jnp.dtype(dtype))
    return unflatten_dict(flat)


def _load_leaf(
    checkpoint: Checkpoint,
    parts: list[naming.Tensor],
    shape: tuple[int, ...],
    sharding: Sharding,
    dtype: np.dtype | None,
) -> jax.Array:
    def read(tensor):
        data = checkpoint.read(tensor.name)
        stored = _stored_sharding(sharding, tensor)
        return jax.make_array_from_callback(data.shape, stored, lambda index: data[index])

    if dtype is None:
        dtype = checkpoint.read(parts[0].name).dtype
    layout = parts[0].layout
    if parts[0].index == ():
        cast = jax.jit(lambda x: _own(x, layout).astype(dtype), out_shardings=sharding)
        return cast(read(parts[0]))
    buffer = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()
    insert = jax.jit(
        functools.partial(_insert, layout=layout), donate_argnums=0, out_shardings=sharding
    )
    for tensor in parts:
        # Waits, so that at most one tensor is under way.
        buffer = jax.block_until_ready(
            insert(buffer, read(tensor), np.array(tensor.index, np.int32))
        )
    return buffer


def _own(x: jax.Array, layout: str) -> jax.Array:
    """A stored tensor as a parameter."""
    if layout == "conv":
        return x[:, 0]
    return x.T if layout == "transposed" else x


def _insert(buffer: jax.Array, x: jax.Array, index: jax.Array, layout: str) -> jax.Array:
    own = _own(x, layout).astype(buffer.dtype)
    stack = buffer.ndim - own.ndim
    start = [index[i] for i in range(stack)] + [0] * own.ndim
    return jax.lax.dynamic_update_slice(buffer, own.reshape((1,) * stack + own.shape), start)


def _extract(param: jax.Array, index: jax.Array, layout: str) -> jax.Array:
    for i in range(index.shape[0]):
        param = jax.lax.dynamic_index_in_dim(param, index[i], 0, keepdims=False)
    if layout == "conv":
        return param[:, None]
    return param.T if layout == "transposed" else param


def _stored_sharding(sharding: Sharding, tensor: naming.Tensor) -> Sharding:
    """That of a stored tensor, from its parameter's."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    own = sharding.spec[len(tensor.index) :]
    if tensor.layout == "transposed":
        own = own[::-1]
    elif tensor.layout == "conv":
        own = (own[0], None, own[1])
    return NamedSharding(sharding.mesh, PartitionSpec(*own))


def cast_params(model: Model, params: Params, dtype: str) -> Params:
    """Parameters in `dtype`; what `from_pretrained` would not round stays float32."""

    def one(path, x):
        return x.astype(jnp.float32 if is_exact(model, path[-1].key, dtype) else dtype)

    return jax.tree_util.tree_map_with_path(one, params)


def save_pretrained(
    model: Model,
    params: Params,
    directory: str | os.PathLike,
    shard_bytes: int = SHARD_BYTES,
    tokenizer: CharTokenizer | None = None,
) -> None:
    """Writes a folder that transformers and vLLM read; parameters keep their dtypes.

    A model from `from_pretrained` keeps its config.json and generation config, its tokenizer, and
    the tensors of parts that are not computed here (vision, multi-token prediction). The folder
    appears when it is complete. For one process: it must be able to see all of the parameters.

    Args:
      model: structure, or what `from_pretrained` returned.
      params: as `model.params`: arrays, neither quantized nor with adapters.
      directory: absent or empty.
      shard_bytes: largest size of one safetensors file.
      tokenizer: of a tiny model that comes from no checkpoint.

    Raises:
      UserError: the folder is not empty or cannot be written.
      TypeError: `params` holds something other than arrays.
    """
    source = getattr(model, "checkpoint", None)
    outputs = _outputs(model, params, source)
    config = dict(source.config) if source else family(model.config).to_hf(model.config)
    with new_folder(pathlib.Path(directory)) as folder:
        _write_descriptions(config, params, source, tokenizer, folder)
        write_folder(folder, outputs, shard_bytes)


def save_orbax(
    model: Model,
    params: Params,
    directory: str | os.PathLike,
    tokenizer: CharTokenizer | None = None,
) -> None:
    """The same with parameters kept by Orbax, which `from_pretrained` reads, each host its part.

    Parts that are not computed here are left behind, so that a multimodal model becomes a text one.

    Raises:
      UserError: the folder is not empty or cannot be written.
    """
    source = getattr(model, "checkpoint", None)
    config = family(model.config).to_hf(model.config)
    if source and source.config.get("model_type") == config["model_type"]:
        config = dict(source.config)
    with new_folder(pathlib.Path(directory)) as folder:
        _write_descriptions(config, params, source, tokenizer, folder)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder.absolute() / ORBAX_PARAMS, params)


def _write_descriptions(
    config: dict,
    params: Params,
    source: Checkpoint | None,
    tokenizer: CharTokenizer | None,
    folder: pathlib.Path,
) -> None:
    dtypes = {str(x.dtype) for x in jax.tree.leaves(params)}
    dtype = "bfloat16" if "bfloat16" in dtypes else "float32"
    config["dtype"] = dtype
    config.pop("torch_dtype", None)  # its older name
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = {**config["text_config"], "dtype": dtype}
    generation = source.generation_config if source else {}
    if tokenizer is not None:
        ids = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        config, generation = {**config, **ids}, {**generation, **ids}
        save_char_tokenizer(tokenizer, folder)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation)
    if source:
        source.save_tokenizer(folder)


def _outputs(model: Model, params: Params, source: Checkpoint | None) -> list[Output]:
    names = set(source.shapes) if source else None
    extract = jax.jit(_extract, static_argnames="layout")
    outputs = []
    for tensor in tensors_of(model.config, names):
        param = leaf(params, tensor.path)
        if not isinstance(param, jax.Array | np.ndarray):
            raise TypeError(f"{'.'.join(tensor.path)} is a {type(param).__name__}, not an array")
        index = np.array(tensor.index, np.int32)
        get = functools.partial(_get, extract, param, index, tensor.layout)
        outputs.append(
            Output(tensor.name, np.dtype(param.dtype), tensor.stored_shape(param.shape), get)
        )
    if isinstance(source, FolderCheckpoint):
        outputs += [
            Output(name, source.dtype(name), source.shapes[name], read)
            for name, read in source.carried().items()
        ]
    return outputs


def _get(extract, param, index, layout) -> np.ndarray:
    return np.asarray(extract(param, index, layout=layout))


def check_free(directory: pathlib.Path) -> None:
    """Raises UserError unless a folder can be made there: it is absent or empty."""
    try:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise UserError(f"{directory} exists and is not empty; choose another folder")
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def new_folder(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write into, which becomes `directory` at the end, or vanishes after an error.

    Raises:
      UserError: `directory` holds something already, or cannot be written.
    """
    directory = directory.absolute()
    check_free(directory)
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        if directory.exists():
            directory.rmdir()
        partial.rename(directory)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
