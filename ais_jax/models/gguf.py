"""A GGUF file read as a published checkpoint: config.json, tensors in float32, tokenizer.

The format quantizes in blocks along a row; its tensors are [out, in] like a checkpoint's. For
the llama architecture llama.cpp stores the query and key rows of a head in the order of
interleaved rotary pairs, which is undone here.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ais_jax.errors import UserError
from ais_jax.models.tokenizers import first_line, write_tokenizer_config

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_TOP = {
    _EMBEDDING: "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    _HEAD: "output.weight",
}
_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Frequencies follow from the config; old converters kept them as tensors.
_UNUSED = ("rope_freqs.weight", "attn_rot_embd.weight")

# How text is cut before byte pairs are merged: words with their space, digits one by one, marks.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL_IDS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown", "eot": "eot"}
_NAMED = ("bos", "eos", "pad")


@dataclasses.dataclass(eq=False)
class GGUFCheckpoint:
    """An open GGUF file; `open_gguf` makes it.

    Attributes:
      path: of the file.
      config: as in config.json.
      generation_config: as in generation_config.json.
      shapes: of the tensors, by their names in a published checkpoint; linears are [out, in].
      metadata: the file's own, with its keys.
      tensors: the file's own, by the names of `shapes`.
    """

    path: pathlib.Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Any]

    def read(self, name: str) -> np.ndarray:
        """A tensor of `shapes`, dequantized to float32.

        Raises:
          UserError: its quantization is unknown.
        """
        gguf = _library()
        tensor = self.tensors[name]
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise UserError(
                f"{self.path}: {tensor.name} is {tensor.tensor_type.name}, which cannot be "
                "dequantized; use a file in another quantization, such as Q8_0"
            ) from None
        values = np.array(values, np.float32).reshape(self.shapes[name])
        if self.config["model_type"] == "llama" and ".q_proj" in name:
            return _rotate_half_order(values, self.config["num_attention_heads"])
        if self.config["model_type"] == "llama" and ".k_proj" in name:
            return _rotate_half_order(values, self.config["num_key_value_heads"])
        return values

    def save_tokenizer(self, directory: str | os.PathLike) -> None:
        """Writes tokenizer.json and tokenizer_config.json, chat template included.

        Raises:
          UserError: the file's kind of tokenizer is not supported, or it is broken.
        """
        directory = pathlib.Path(directory)
        try:
            backend = _tokenizer(self.metadata)
            tokens = self.metadata["tokenizer.ggml.tokens"]
            special = _special_ids(self.metadata, len(tokens))
            entries = {f"{name}_token": tokens[i] for name, i in special.items() if name != "eot"}
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
        if template := self.metadata.get("tokenizer.chat_template"):
            entries["chat_template"] = template
        backend.save(str(directory / "tokenizer.json"))
        write_tokenizer_config(directory, **entries)


def open_gguf(path: str | os.PathLike) -> GGUFCheckpoint:
    """Opens a GGUF file of architecture llama or qwen3; tensors are read only on demand.

    Raises:
      UserError: it is no GGUF file, damaged, or of a model this library does not have; or the
        gguf library is missing.
    """
    gguf = _library()
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file; give the path of a .gguf file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file: it does not start with 'GGUF'")
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, LookupError, OverflowError, MemoryError, RecursionError) as error:
        raise UserError(
            f"{path} is cut short or damaged ({first_line(error)}); download it again"
        ) from None
    stored = {tensor.name: tensor for tensor in reader.tensors}
    try:
        config = _config(metadata, stored)
        names = _names(config)
        shapes = _shapes(config, names, stored)
        generation_config = _generation_config(metadata, config["vocab_size"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    tensors = {name: stored[names[name]] for name in shapes}
    return GGUFCheckpoint(path, config, generation_config, shapes, metadata, tensors)


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError(
            "reading GGUF files needs the gguf library: pip install 'ais-jax[gguf]'"
        ) from None
    return gguf


def _config(metadata: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the model. The embedding tells the vocabulary's size: metadata may not."""
    arch = metadata.get("general.architecture")
    if arch not in tuple(ARCHITECTURES):
        raise UserError(
            f"architecture {arch!r} is not supported; one of {', '.join(ARCHITECTURES)} is"
        )
    embedding = stored.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UserError("tensor token_embd.weight is missing or no matrix; download the file again")

    def size(key: str, default: int | None = None) -> int:
        return _size(metadata, f"{arch}.{key}", default)

    heads = size("attention.head_count")
    layers = size("block_count")
    if layers > len(stored):
        raise UserError(
            f"{arch}.block_count={layers}, but there are only {len(stored)} tensors; "
            "download the file again"
        )
    _check_rope(metadata, stored, arch)
    special = _special_ids(metadata, int(embedding.shape[-1]))
    return {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": arch,
        "vocab_size": int(embedding.shape[-1]),
        "hidden_size": size("embedding_length"),
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "head_dim": _head_dim(metadata, arch),
        "max_position_embeddings": size("context_length"),
        "rope_theta": _real(metadata, f"{arch}.rope.freq_base", 10000.0),
        "rms_norm_eps": _real(metadata, f"{arch}.attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": "output.weight" not in stored,
        **{f"{name}_token_id": special[name] for name in _NAMED if name in special},
    }


def _size(metadata: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = metadata.get(key, default)
    if type(value) is not int or value < 1:
        raise UserError(f"{key} is {value!r}, not one whole number above 0")
    return value


def _head_dim(metadata: Mapping[str, Any], arch: str) -> int:
    """Size of a head, which queries, keys, values and rotary positions share."""
    hidden = _size(metadata, f"{arch}.embedding_length")
    default = hidden // _size(metadata, f"{arch}.attention.head_count")
    dim = _size(metadata, f"{arch}.attention.key_length", default)
    if dim % 2:
        raise UserError(f"{arch}.attention.key_length={dim} is odd: no rotary pairs")
    for key in (f"{arch}.attention.value_length", f"{arch}.rope.dimension_count"):
        if (value := _size(metadata, key, dim)) != dim:
            raise UserError(f"{key}={value} is not supported; only {dim} is")
    return dim


def _real(metadata: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A float32 of the file as the decimal number it stands for: 1e-05, not 9.999999747e-06."""
    value = metadata.get(key, default)
    if not isinstance(value, float) or not 0 < value < float("inf"):
        raise UserError(f"{key} is {value!r}, not a number above 0")
    return float(str(np.float32(value)))


def _check_rope(metadata: Mapping[str, Any], stored: Mapping[str, Any], arch: str) -> None:
    """Raises UserError where positions are rescaled: by a setting, or by factors not all 1."""
    kind = metadata.get(f"{arch}.rope.scaling.type", "none")
    factors = stored.get("rope_freqs.weight")
    if kind != "none" or (factors is not None and not np.all(factors.data == 1)):
        what = f"{arch}.rope.scaling.type={kind!r}" if kind != "none" else "rope_freqs.weight"
        raise UserError(f"{what} rescales positions, which is not supported")


def _special_ids(metadata: Mapping[str, Any], count: int) -> dict[str, int]:
    """Ids of bos, eos, pad, unk and eot (the end of a turn), of those that the file names."""
    found = {}
    for name, stored in _SPECIAL_IDS.items():
        value = metadata.get(f"tokenizer.ggml.{stored}_token_id")
        if value is None:
            continue
        if type(value) is not int or not 0 <= value < count:
            raise UserError(f"tokenizer.ggml.{stored}_token_id={value!r} is not below {count}")
        found[name] = value
    return found


def _generation_config(metadata: Mapping[str, Any], count: int) -> dict[str, Any]:
    special = _special_ids(metadata, count)
    ids: dict[str, Any] = {f"{name}_token_id": special[name] for name in _NAMED if name in special}
    if ends := list(dict.fromkeys(special[name] for name in ("eos", "eot") if name in special)):
        ids["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return ids


def _names(config: Mapping[str, Any]) -> dict[str, str]:
    """The file's tensor names by those of a published checkpoint."""
    names = {ours: theirs for ours, theirs in _TOP.items() if ours != _HEAD}
    if not config["tie_word_embeddings"]:
        names[_HEAD] = _TOP[_HEAD]
    has_norms = config["model_type"] == "qwen3"
    for i in range(config["num_hidden_layers"]):
        for ours, theirs in _BLOCK.items():
            if has_norms or theirs not in ("attn_q_norm", "attn_k_norm"):
                names[f"model.layers.{i}.{ours}.weight"] = f"blk.{i}.{theirs}.weight"
    return names


def _shapes(
    config: Mapping[str, Any], names: Mapping[str, str], stored: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Shapes by published name, in the order [out, in].

    Raises:
      UserError: a tensor is missing, unknown or of another shape than the config says.
    """
    if missing := [theirs for theirs in names.values() if theirs not in stored]:
        raise UserError(
            f"{len(missing)} tensors are missing, such as {missing[0]}; "
            "the file is incomplete or of a variant that is not supported"
        )
    unknown = [n for n in sorted(stored.keys() - set(names.values())) if not n.endswith(_UNUSED)]
    if unknown:
        raise UserError(
            f"tensor {unknown[0]!r} is not part of a {config['model_type']} model without biases "
            "or experts, and only those are supported"
        )
    shapes = {ours: tuple(map(int, stored[theirs].shape[::-1])) for ours, theirs in names.items()}
    for name, shape in shapes.items():
        expected = _expected_shape(config, name)
        if shape != expected:
            raise UserError(f"{names[name]} has shape {shape}, but the metadata says {expected}")
    return shapes


def _expected_shape(config: Mapping[str, Any], name: str) -> tuple[int, ...]:
    hidden, ffn, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    sizes: dict[str, tuple[int, ...]] = {
        "embed_tokens": (config["vocab_size"], hidden),
        "lm_head": (config["vocab_size"], hidden),
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "q_norm": (dim,),
        "k_norm": (dim,),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
    }
    return sizes.get(name.split(".")[-2], (hidden,))


def _rotate_half_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * d, in] from (0, d/2, 1, d/2 + 1, ...) of each head to (0, 1, ..., d - 1)."""
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, width))


def _tokenizer(metadata: Mapping[str, Any]) -> Any:
    """The byte-level BPE of the file, of the tokenizers library."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    gguf = _library()
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise UserError(f"tokenizer.ggml.model={kind!r} is not supported; only 'gpt2' is")
    tokens, types, merges = (
        _list(metadata, f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "merges")
    )
    if len(types) != len(tokens):
        raise UserError(f"{len(types)} tokenizer.ggml.token_type for {len(tokens)} tokens")
    # Converters fill padded embedding rows with unused tokens, which nobody may sample.
    vocabulary = {
        token: i
        for i, (token, type_) in enumerate(zip(tokens, types, strict=True))
        if type_ != gguf.TokenType.UNUSED
    }
    try:
        model = models.BPE(vocabulary, [tuple(merge.split(" ", 1)) for merge in merges])
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UserError(f"the tokenizer's merges are broken: {first_line(error)}") from None
    backend = Tokenizer(model)
    backend.normalizer, backend.pre_tokenizer = _text_split(metadata.get("tokenizer.ggml.pre"))
    backend.decoder = decoders.ByteLevel()
    for token, type_ in zip(tokens, types, strict=True):
        if type_ == gguf.TokenType.CONTROL:
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif type_ == gguf.TokenType.USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False)])
    return backend


def _list(metadata: Mapping[str, Any], key: str) -> list:
    value = metadata.get(key)
    if not isinstance(value, list):
        raise UserError(f"{key} is missing, or no list")
    return value


def _text_split(pre: str | None) -> tuple[Any, Any]:
    """(normalizer, pre-tokenizer) that a file names by `tokenizer.ggml.pre`."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in ("default", "gpt-2"):
        return None, words
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return None, pre_tokenizers.Sequence([digits, words])
    if pre == "qwen2":
        split = pre_tokenizers.Split(Regex(_QWEN2_SPLIT), "isolated")
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return normalizers.NFC(), pre_tokenizers.Sequence([split, as_bytes])
    raise UserError(
        f"tokenizer.ggml.pre={pre!r} is not supported; one of smollm, qwen2, gpt-2, default is"
    )
