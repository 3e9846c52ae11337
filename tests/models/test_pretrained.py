"""Checkpoints in and out: bit for bit, sharded, in the library's own format, and damaged ones."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

from ais_jax import quantize
from ais_jax.errors import UserError
from ais_jax.mesh import MeshConfig, make_mesh
from ais_jax.models import LladaConfig, Qwen3Config, build, from_pretrained, save_pretrained
from ais_jax.models.checkpoint import tensors_of

QWEN = Qwen3Config(
    vocab_size=40,
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=False,
)
CONFIGS = {
    "qwen3": QWEN,
    "tied": dataclasses.replace(QWEN, tie_word_embeddings=True),
    "llama": dataclasses.replace(QWEN, qk_norm=False, rms_norm_eps=1e-5),
    "llada": LladaConfig(
        vocab_size=40,
        d_model=24,
        mlp_hidden_size=32,
        n_layers=2,
        n_heads=3,
        n_kv_heads=3,
        mask_token_id=30,
    ),
}


def random_params(model, dtype="float32", seed=0):
    """Every leaf random, norms too, so that none can be mistaken for another."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.1, dtype), model.abstract_params()
    )


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(_bits(x), _bits(y)), a, b)


def _bits(x):
    return np.atleast_1d(np.asarray(x)).view(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """A saved checkpoint, one file."""
    model = build(QWEN, "float32")
    save_pretrained(model, random_params(model), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_round_trip_is_exact(tmp_path, name, dtype):
    model = build(CONFIGS[name], dtype)
    params = random_params(model, dtype)
    save_pretrained(model, params, tmp_path / "a")
    loaded = from_pretrained(tmp_path / "a", dtype)
    assert loaded.config == model.config
    assert loaded.structure == model
    assert_same(loaded.params, params)
    # Once more, from what was loaded, in shards of a few kilobytes each.
    save_pretrained(loaded, loaded.params, tmp_path / "b", shard_bytes=5000)
    shards = sorted(tmp_path.glob("b/*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "b" / "model.safetensors").exists()
    assert_same(from_pretrained(tmp_path / "b", dtype).params, params)


def test_the_safetensors_library_reads_the_same_tensors(tmp_path):
    model = build(QWEN)
    params = random_params(model, "bfloat16")
    save_pretrained(model, params, tmp_path / "a", shard_bytes=4000)
    stored = {}
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        with safetensors.safe_open(tmp_path / "a" / file, "numpy") as shard:
            assert shard.metadata() == {"format": "pt"}
            stored[name] = shard.get_tensor(name)
    q = np.asarray(params["layers"]["q_proj"])
    np.testing.assert_array_equal(stored["model.layers.1.self_attn.q_proj.weight"], q[1].T)
    np.testing.assert_array_equal(stored["lm_head.weight"], np.asarray(params["lm_head"]).T)
    assert sum(x.size for x in stored.values()) == sum(x.size for x in jax.tree.leaves(params))
    assert index["metadata"]["total_size"] == 2 * sum(x.size for x in stored.values())


def test_published_llada_names(tmp_path):
    config = CONFIGS["llada"]
    names = {t.name: t.path[-1] for t in tensors_of(config)}
    assert len(names) == 9 * config.n_layers + 3
    block = "model.transformer.blocks.1."
    assert names[f"{block}ff_proj.weight"] == "gate_proj"
    assert names[f"{block}ff_out.weight"] == "down_proj"
    assert names["model.transformer.ff_out.weight"] == "lm_head"


@pytest.mark.smoke
def test_parameters_arrive_sharded(tmp_path):
    model = build(QWEN, "float32")
    params = random_params(model)
    save_pretrained(model, params, tmp_path / "a")
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    loaded = from_pretrained(tmp_path / "a", "float32", mesh)
    assert_same(loaded.params, params)
    q = loaded.params["layers"]["q_proj"]
    assert q.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    assert q.addressable_shards[0].data.shape == (3, 6, 16)
    ids = jnp.arange(12).reshape(2, 6)
    np.testing.assert_allclose(
        loaded.logits(loaded.params, ids), model.logits(params, ids), rtol=0, atol=1e-5
    )
    save_pretrained(loaded, loaded.params, tmp_path / "b")
    assert_same(from_pretrained(tmp_path / "b", "float32").params, params)


def test_casting_rounds_to_nearest_even(folder):
    exact = from_pretrained(folder, "float32").params["layers"]["q_proj"]
    rounded = from_pretrained(folder, "bfloat16").params["layers"]["q_proj"]
    np.testing.assert_array_equal(np.asarray(rounded), np.asarray(exact).astype(ml_dtypes.bfloat16))


def test_config_and_other_files_are_kept(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"something_else": [1, 2]}))
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    model = from_pretrained(folder, "float32")
    save_pretrained(model, model.params, tmp_path / "b")
    saved = json.loads((tmp_path / "b" / "config.json").read_text())
    assert saved["something_else"] == [1, 2] and saved["dtype"] == "float32"
    generation = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [5, 6]}
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_stale_output_layer_of_a_tied_model_is_dropped(tmp_path):
    model = build(CONFIGS["tied"], "float32")
    save_pretrained(model, random_params(model), tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    with safetensors.safe_open(file, "numpy") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    save_file(tensors | {"lm_head.weight": np.ones((40, 24), np.float32)}, file)
    loaded = from_pretrained(tmp_path / "a", "float32")
    save_pretrained(loaded, loaded.params, tmp_path / "b")
    with safetensors.safe_open(tmp_path / "b" / "model.safetensors", "numpy") as stored:
        assert set(stored.keys()) == set(tensors)


# What is wrong with a checkpoint is said in one line that names the file and the tensor.


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(folder, *words):
    with pytest.raises(UserError) as caught:
        from_pretrained(folder)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


def test_a_missing_shard(tmp_path):
    model = build(QWEN)
    save_pretrained(model, random_params(model), tmp_path / "a", shard_bytes=8000)
    victim = sorted((tmp_path / "a").glob("*.safetensors"))[1]
    victim.unlink()
    refused(tmp_path / "a", victim.name, "missing", "model.layers.")


@pytest.mark.parametrize("cut", [3, 100, -1])
def test_a_truncated_file(folder, cut):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    refused(folder, "model.safetensors", "truncated", "tensor " if cut == -1 else "header")


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{" * 5000,
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 7]}}',
        b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}',
        b'{"a": {"dtype": "X9", "shape": [2], "data_offsets": [0, 8]}}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_header(folder, header):
    (folder / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + b"0" * 8
    )
    refused(folder, "model.safetensors", "damaged")


def test_a_pickle_is_never_opened(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "pickle", "safetensors")


def test_sizes_that_contradict_the_tensors(folder):
    edit_config(folder, intermediate_size=64)
    refused(folder, "model.layers.0.mlp.gate_proj.weight", "[32, 24]", "[64, 24]")


def test_a_missing_tensor(folder):
    edit_config(folder, num_hidden_layers=4)
    refused(folder, "model.layers.3.", "missing")


def test_a_tensor_too_many(folder):
    edit_config(folder, num_hidden_layers=2)
    refused(folder, "model.layers.2.", "no part")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, ("model_type='gpt2'", "qwen3")),
        ({"model_type": None}, ("model_type=None",)),
        ({"hidden_size": "24"}, ("hidden_size", "'24'")),
        ({"num_attention_heads": 3}, ("num_key_value_heads=2", "num_attention_heads=3")),
        ({"attention_bias": True}, ("attention_bias=True",)),
        ({"hidden_act": "gelu"}, ("hidden_act='gelu'", "silu")),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, ("yarn",)),
        ({"quantization_config": {"quant_method": "fp8"}}, ("quantized",)),
    ],
)
def test_a_config_that_cannot_be_run(folder, change, words):
    edit_config(folder, **change)
    refused(folder, "config.json", *words)


def test_what_is_not_a_checkpoint(tmp_path):
    refused(tmp_path / "nothing", "nothing", "no such folder")
    refused(tmp_path, "config.json")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "config.json", "not JSON")
    (tmp_path / "weights.pt").write_text("")
    refused(tmp_path / "weights.pt", "weights.pt", ".gguf")


def test_an_index_cannot_lead_out_of_the_folder(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "../other.safetensors", "not the name of a safetensors file")


def test_nothing_is_left_half_written(tmp_path):
    model = build(QWEN, "float32")
    params = random_params(model)
    broken = {**params, "norm": quantize.QuantArray(params["norm"], params["norm"])}
    with pytest.raises(TypeError, match="norm is a QuantArray"):
        save_pretrained(model, broken, tmp_path / "a")

    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    with pytest.raises(UserError, match="used exists and is not empty"):
        save_pretrained(model, params, tmp_path / "used")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["used"]
    assert (tmp_path / "used" / "file").read_text() == "mine"


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    model = build(QWEN, "float32")
    params = random_params(model)

    def full(data, stream):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ais_jax.models.safetensors_io._append", full)
    with pytest.raises(UserError, match=r"a cannot be written: No space left"):
        save_pretrained(model, params, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 10**9}, ("1000000000 layers", "tensors")),
        ({"rope_parameters": [1]}, ("rope_parameters", "not a section")),
        ({"rope_parameters": {"rope_theta": "x"}}, ("rope_theta", "a number")),
        ({"rms_norm_eps": 0}, ("rms_norm_eps=0", "above 0")),
    ],
)
def test_a_config_that_makes_no_sense(folder, change, words):
    edit_config(folder, **change)
    refused(folder, *words)


def test_no_quantization_is_no_reason_to_refuse(folder):
    edit_config(folder, quantization_config=None)
    from_pretrained(folder)


@pytest.mark.parametrize("name", ["..", ".", "", "x.bin", "n" * 300 + ".safetensors"])
def test_an_index_of_impossible_names(folder, name):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "model.norm.weight" if len(name) > 99 else repr(name))


def test_a_name_twice_in_a_header(folder):
    entry = '"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}'
    header = f"{{{entry}, {entry}}}".encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    refused(folder, "model.safetensors", "damaged")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope": False}, ("rope=False",)),
        ({"clip_qkv": 8.0}, ("clip_qkv=8.0",)),
        ({"mask_token_id": 40}, ("mask_token_id=40", "40")),
        ({"n_heads": 5}, ("n_heads=5", "d_model=24")),
        ({"n_kv_heads": 2}, ("n_kv_heads=2", "n_heads=3")),
    ],
)
def test_a_llada_config_that_cannot_be_run(tmp_path, change, words):
    model = build(CONFIGS["llada"])
    save_pretrained(model, random_params(model), tmp_path / "a")
    from_pretrained(tmp_path / "a")
    edit_config(tmp_path / "a", **change)
    refused(tmp_path / "a", *words)


def test_the_python_files_of_a_checkpoint_are_carried_and_never_run(tmp_path):
    model = build(CONFIGS["llada"])
    save_pretrained(model, random_params(model), tmp_path / "a")
    code = {"AutoModel": "modeling_llada.LLaDAModelLM", "AutoConfig": "../evil.X"}
    edit_config(tmp_path / "a", auto_map=code)
    (tmp_path / "a" / "modeling_llada.py").write_text("raise SystemExit('run')")
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    loaded = from_pretrained(tmp_path / "a")
    save_pretrained(loaded, loaded.params, tmp_path / "b")
    assert (tmp_path / "b" / "modeling_llada.py").exists()
    assert not list((tmp_path / "b").glob("*evil*"))
