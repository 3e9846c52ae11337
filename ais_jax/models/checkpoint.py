"""Published checkpoints: what a folder or a GGUF file holds, checked before anything is read."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from ais_jax.errors import UserError
from ais_jax.models import naming
from ais_jax.models.model import FAMILIES, Model, ModelConfig, Params, build, family
from ais_jax.models.safetensors_io import read_json, scan_folder, write_json
from ais_jax.models.tokenizers import TextTokenizer, load_tokenizer, tokenizer_files

# Parts of multimodal checkpoints that are not computed here; they are carried over as they are.
_CARRIED = re.compile(r"(model\.)?(visual|mtp)\.")
# Left over from older libraries, or a copy of the embedding in a model that ties the two.
_DROPPED = re.compile(r"lm_head\.weight$|.*rotary_emb\.inv_freq$")
_OWN = re.compile(r"(model|lm_head)\.")
ORBAX_PARAMS = "params"
_FLOATS = ("float32", "bfloat16", "float16", "float64")


class Checkpoint(Protocol):
    """Tensors by published name, with the JSON files that go with them."""

    config: dict[str, Any]
    generation_config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> np.ndarray:
        """A tensor, in its stored dtype."""

    def save_tokenizer(self, directory: pathlib.Path) -> None:
        """Writes the tokenizer's files, if there are any."""


class Folder:
    """config.json and, if they are there, generation_config.json and a tokenizer's files.

    Raises:
      UserError: a file is missing or damaged, or the weights are quantized.
    """

    shapes: dict[str, tuple[int, ...]]

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        self.config = read_json(directory / "config.json")
        if self.config.get("quantization_config"):
            raise UserError(
                f"{directory / 'config.json'}: a quantized checkpoint cannot be trained; use the "
                "unquantized one, and choose rollout.recipe for sampling"
            )
        generation = directory / "generation_config.json"
        self.generation_config = read_json(generation) if generation.exists() else {}
        self.shapes = {}

    def save_tokenizer(self, directory: pathlib.Path) -> None:
        """Copies the tokenizer's files, if there are any, and the code that config.json names.

        The code is not run here; without it others could not load what needs it.
        """
        for file in [*tokenizer_files(self.directory), *self._code_files()]:
            shutil.copyfile(file, directory / file.name)

    def _code_files(self) -> list[pathlib.Path]:
        references = self.config.get("auto_map")
        values = references.values() if isinstance(references, dict) else ()
        names = {str(x).rpartition("--")[2].partition(".")[0] + ".py" for x in values}
        files = [self.directory / name for name in sorted(names) if name == os.path.basename(name)]
        return [file for file in files if file.is_file()]


class FolderCheckpoint(Folder):
    """A Hugging Face folder of safetensors.

    Raises:
      UserError: a file is missing or damaged, or the weights are quantized.
    """

    def __init__(self, directory: pathlib.Path):
        super().__init__(directory)
        self._entries = scan_folder(directory)
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def read(self, name: str) -> np.ndarray:
        """A tensor, in its stored dtype."""
        entry = self._entries[name]
        if entry.dtype.name not in _FLOATS:
            raise UserError(f"{entry.file}: tensor {name} is {entry.dtype}, not a float")
        return entry.read()

    def dtype(self, name: str) -> np.dtype:
        """Stored dtype of a tensor."""
        return self._entries[name].dtype

    def carried(self) -> dict[str, Callable[[], np.ndarray]]:
        """Tensors of parts that are not computed here, by name."""
        return {k: entry.read for k, entry in self._entries.items() if _CARRIED.match(k)}


class OrbaxCheckpoint(Folder):
    """A folder whose parameters are kept by Orbax, as they are in memory.

    Each host reads only what it will hold, which suits pods.
    """

    def read(self, name: str) -> np.ndarray:
        """Not used: `restore` reads everything at once."""
        raise NotImplementedError

    def restore(self, model: Model, shardings: Any, dtype: str) -> Params:
        """The parameters, in `shardings` and `dtype`; what is exact keeps its stored dtype.

        Raises:
          UserError: they are damaged, or others than the model's.
        """
        path = (self.directory / ORBAX_PARAMS).absolute()

        def target(keys, x, sharding):
            kept = x.dtype if is_exact(model, keys[-1].key, dtype) else np.dtype(dtype)
            return jax.ShapeDtypeStruct(x.shape, kept, sharding=sharding)

        try:
            with ocp.StandardCheckpointer() as checkpointer:
                stored = checkpointer.metadata(path).item_metadata.tree
                _check_stored(stored, model, path)
                wanted = jax.tree_util.tree_map_with_path(target, stored, shardings)
                return checkpointer.restore(path, wanted)
        except UserError:
            raise
        except Exception as error:  # Orbax raises whatever its layers below do
            raise UserError(
                f"{path} is damaged, or no Orbax checkpoint ({type(error).__name__}): write it "
                "again with ais-jax convert"
            ) from error


def _check_stored(stored: Params, model: Model, path: pathlib.Path) -> None:
    found, expected = flatten_dict(stored), flatten_dict(model.abstract_params())
    for key in [*expected, *found]:
        a, b = (list(x[key].shape) if key in x else "absent" for x in (found, expected))
        if a != b:
            raise UserError(
                f"{path}: {'.'.join(key)} is {a}, but the sizes in config.json make it {b}"
            )


def is_exact(model: Model, name: str, dtype: str) -> bool:
    """Whether a parameter keeps its stored dtype when a model is loaded in `dtype`."""
    return dtype != "float32" and name in family(model.config).STORED_DTYPE


def open_checkpoint(path: str | pathlib.Path) -> Checkpoint:
    """A checkpoint folder or a .gguf file.

    Raises:
      UserError: nothing is there, or it is damaged.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        return (OrbaxCheckpoint if (path / ORBAX_PARAMS).is_dir() else FolderCheckpoint)(path)
    if not path.exists():
        raise UserError(f"{path}: no such folder or file; give a checkpoint folder or a .gguf file")
    if path.suffix != ".gguf":
        raise UserError(f"{path}: give the folder of a checkpoint, or a .gguf file")
    from ais_jax.models.gguf import open_gguf

    return open_gguf(path)


def config_of(raw: dict[str, Any], where: str) -> ModelConfig:
    """The sizes in the published config.json of the checkpoint at `where`.

    Raises:
      UserError: unknown model_type, or what the family refuses.
    """
    kind = raw.get("model_type")
    for module in FAMILIES:
        if kind in module.MODEL_TYPES:
            try:
                return module.from_hf(raw)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
    known = ", ".join(name for module in FAMILIES for name in module.MODEL_TYPES)
    raise UserError(f"{where}: config.json: model_type={kind!r} is unknown; one of {known}")


def tensors_of(config: ModelConfig, names: set[str] | None = None) -> list[naming.Tensor]:
    """A model's tensors under their published names.

    Args:
      config: sizes.
      names: what a checkpoint holds. Text models and multimodal ones differ by a prefix; without
        names it is that of text models.
    """
    module = family(config)
    options = [list(module.tensors(config, prefix)) for prefix in module.PREFIXES]
    return next((x for x in options if names and x[0].name in names), options[0])


def check_tensors(checkpoint: Checkpoint, model: Model, where: str) -> list[naming.Tensor]:
    """The model's tensors, all of which are in the checkpoint with the right shapes.

    Tensors outside of the model's namespace ("model." and "lm_head.") are no concern of it.

    Raises:
      UserError: one is missing, of another shape, or in the namespace and not known.
    """
    blocks = getattr(model.config, "num_hidden_layers", 0) or getattr(model.config, "n_layers", 0)
    if blocks > len(checkpoint.shapes):
        raise UserError(
            f"{where}: config.json asks for {blocks} layers, but there are only "
            f"{len(checkpoint.shapes)} tensors"
        )
    tensors = tensors_of(model.config, set(checkpoint.shapes))
    params = model.abstract_params()
    for tensor in tensors:
        expected = tensor.stored_shape(leaf(params, tensor.path).shape)
        found = checkpoint.shapes.get(tensor.name)
        if found is None:
            raise UserError(f"{where}: tensor {tensor.name} is missing; config.json asks for it")
        if found != expected:
            raise UserError(
                f"{where}: tensor {tensor.name} is {list(found)}, but the sizes in config.json "
                f"make it {list(expected)}"
            )
    known = {tensor.name for tensor in tensors}
    for name in checkpoint.shapes:
        outside = _CARRIED.match(name) or _DROPPED.match(name) or not _OWN.match(name)
        if name not in known and not outside:
            raise UserError(
                f"{where}: tensor {name} belongs to no part of a "
                f"{checkpoint.config.get('model_type')} model as config.json describes it"
            )
    return tensors


def open_model(
    path: str | pathlib.Path, dtype: str = "bfloat16", remat: bool = False
) -> tuple[Checkpoint, Model, list[naming.Tensor]]:
    """A checkpoint, its model's structure and where each tensor belongs; no tensor is read.

    Raises:
      UserError: see `open_checkpoint`, `config_of`, `check_tensors`.
    """
    checkpoint = open_checkpoint(path)
    model = build(config_of(checkpoint.config, str(path)), dtype, remat)
    if isinstance(checkpoint, OrbaxCheckpoint):
        return checkpoint, model, []
    return checkpoint, model, check_tensors(checkpoint, model, str(path))


def tokenizer_of(checkpoint: Checkpoint) -> TextTokenizer:
    """The tokenizer that a checkpoint carries.

    Raises:
      UserError: it carries none, or a damaged one.
    """
    if isinstance(checkpoint, Folder):
        return load_tokenizer(checkpoint.directory)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_json(folder / "config.json", checkpoint.config)
        write_json(folder / "generation_config.json", checkpoint.generation_config)
        checkpoint.save_tokenizer(folder)
        return load_tokenizer(folder)


def leaf(tree: Any, path: naming.Path) -> Any:
    """What lies at `path` in nested dicts."""
    for key in path:
        tree = tree[key]
    return tree
