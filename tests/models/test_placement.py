"""Over a mesh: rows stay on their devices, and an output layer that is split stays split."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ais_jax import config as config_lib
from ais_jax import mesh as mesh_lib
from ais_jax import settings
from ais_jax.aot import hlo
from ais_jax.models import Qwen3_5Config, Qwen3Config, build
from ais_jax.sampling import Policy, Rollout, SamplingConfig
from ais_jax.sampling import logps as lp
from ais_jax.train import setup

ROWS, PROMPT, LENGTH, VOCAB, WIDTH = 8, 4, 6, 74, 16
MODELS = {
    "qwen3": Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=False,
    ),
    "qwen3_5": Qwen3_5Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        full_attention_interval=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        tie_word_embeddings=False,
    ),
}


@pytest.fixture(scope="module")
def mesh():
    return mesh_lib.make_mesh(mesh_lib.MeshConfig(data=1, fsdp=4, tensor=2))


def spread(model, mesh):
    """(the model over a mesh, its parameters there, the same on one device)."""
    params = jax.jit(model.init)(jax.random.key(0))
    places = mesh_lib.param_shardings(model.param_axes(), params, mesh, mesh_lib.TRAIN_RULES)
    return dataclasses.replace(model, mesh=mesh), jax.device_put(params, places), params


@pytest.mark.parametrize("name", MODELS)
def test_rows_stay_where_they_are(name, mesh):
    model = build(MODELS[name], "float32")
    there, placed, params = spread(model, mesh)
    tokens = np.random.default_rng(0).integers(2, VOCAB, (ROWS, PROMPT + LENGTH))
    ids = jax.device_put(tokens, mesh_lib.batch_sharding(mesh))
    mask = jnp.ones(tokens.shape, bool)

    def residual(model, params, tokens):
        """What leaves the last block, over the devices as the compiler has it."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return model.hidden(params, tokens, positions, mask)[0]

    got = jax.jit(functools.partial(residual, there))(placed, ids)
    assert got.sharding.is_equivalent_to(mesh_lib.batch_sharding(mesh), got.ndim)
    want = jax.jit(functools.partial(residual, model))(params, tokens)
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_rows_that_the_devices_do_not_divide_are_left_alone(mesh):
    x = jnp.arange(6.0).reshape(3, 2)
    for where in (mesh, None):
        out = jax.jit(functools.partial(mesh_lib.spread_rows, mesh=where))(x)
        np.testing.assert_array_equal(out, x)


def test_a_split_output_layer_is_not_gathered(mesh, monkeypatch):
    """Log-probs over a split vocabulary are those of one device, whatever slices those are of."""
    monkeypatch.setattr(lp, "VOCAB_CHUNK", 16)
    model = build(MODELS["qwen3"], "float32")
    there, placed, params = spread(model, mesh)
    sampling = SamplingConfig(LENGTH, 1.0, 0, (1,), VOCAB, score_chunk=3)
    rng = np.random.default_rng(1)
    batch = Rollout(
        prompts=rng.integers(2, VOCAB, (ROWS, PROMPT)).astype(np.int32),
        prompt_mask=np.ones((ROWS, PROMPT), bool),
        tokens=rng.integers(1, VOCAB, (ROWS, LENGTH)).astype(np.int32),
        mask=np.ones((ROWS, LENGTH), bool),
        logps=np.zeros((ROWS, LENGTH), np.float32),
        truncated=np.zeros(ROWS, bool),
    )

    def loss(policy, params, batch):
        logps, entropy = policy.score(params, batch)
        return jnp.sum(logps + 0.1 * entropy)

    def compiled(model, params, batch):
        grad = jax.jit(jax.value_and_grad(functools.partial(loss, Policy(model, sampling))))
        return grad.lower(params, batch).compile()

    rows = jax.device_put(batch, mesh_lib.batch_sharding(mesh))
    program = compiled(there, placed, rows)
    value, grads = program(placed, rows)
    want, expected = compiled(model, params, jax.tree.map(jnp.asarray, batch))(
        params, jax.tree.map(jnp.asarray, batch)
    )
    assert float(value) == pytest.approx(float(want), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), grads, expected)
    module = hlo.parse(program.as_text())
    gathered = {
        shape.dims
        for body in module.computations.values()
        for i in body.values()
        if i.opcode.startswith("all-gather")
        for shape in i.shapes
    }
    assert gathered
    assert (WIDTH, VOCAB) not in gathered


@pytest.mark.parametrize("devices", [1, 8])
def test_a_run_s_model_knows_its_mesh(tmp_path, devices):
    config = settings.build(config_lib.Config, {"mesh": {"data": devices}})
    run = setup.build_run(config, tmp_path, jax.devices()[:devices])
    assert run.policy.model.mesh is not None
    assert run.policy.model.mesh.shape["data"] == devices
