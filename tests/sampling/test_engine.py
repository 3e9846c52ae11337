"""Segments, compaction, refilling and layout change nothing about what a row samples."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from tiny_model import EOS, PAD, QWEN3, VOCAB, enlarged

from ais_jax import mesh as mesh_lib
from ais_jax.models import Qwen3_5Config, build
from ais_jax.models import cache as cache_lib
from ais_jax.models.blocks import Unstacked
from ais_jax.sampling import Policy, SamplingConfig, autoregressive, decoding, sampling_copy

WIDTH, LENGTH = 9, 16
HYBRID = Qwen3_5Config(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    full_attention_interval=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    partial_rotary_factor=0.5,
    tie_word_embeddings=False,
)
SAMPLING = SamplingConfig(
    max_new_tokens=LENGTH, temperature=1.0, pad_id=PAD, eos_ids=(EOS, 2), token_count=20
)
# Everything happens: the cache grows and is shifted, rows are compacted and refilled.
BUSY = {
    "segments": {"segment": 6},
    "compaction": {"compact_steps": 1},
    "refill": {"slots": 4, "segment": 8},
    "all": {"slots": 4, "segment": 8, "prefill_chunk": 4, "compact_steps": 1},
}
MODELS = {"qwen3": QWEN3, "qwen3_5": HYBRID}


def policy_of(name="qwen3", dtype="float32", **engine):
    return Policy(build(MODELS[name], dtype), dataclasses.replace(SAMPLING, **engine))


def params_of(policy):
    # The delta rule doubles the differences of rounding where its inputs are large.
    factor = 6 if policy.model.config is QWEN3 else 2
    return enlarged(policy.model.init(jax.random.key(0)), factor, 6)


def batch(rows=8):
    return tiny_model.batch(rows, WIDTH)


def same(a, b, rows=slice(None)):
    np.testing.assert_array_equal(a.tokens, b.tokens[rows])
    np.testing.assert_array_equal(a.mask, b.mask[rows])
    np.testing.assert_array_equal(a.truncated, b.truncated[rows])
    np.testing.assert_allclose(a.logps, b.logps[rows], atol=1e-5)


def log(monkeypatch):
    """Which parts of the engine ran."""
    seen = []
    for name in ("grow", "shift", "take", "refill"):
        function = getattr(decoding, name)

        def spy(*args, function=function, name=name, **kwargs):
            seen.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(decoding, name, spy)
    return seen


def caches(monkeypatch):
    """The cache that each part of the engine has last returned, by the part's name."""
    held = {}
    for name in ("grow", "refill"):
        function = getattr(decoding, name)

        def spy(*args, function=function, name=name, **kwargs):
            state = function(*args, **kwargs)
            held[name] = state.cache
            return state

        monkeypatch.setattr(decoding, name, spy)
    return held


@pytest.mark.parametrize(
    ("name", "engine"), [*(("qwen3", engine) for engine in BUSY), ("qwen3_5", "all")]
)
def test_no_arrangement_of_rows_changes_what_they_sample(name, engine, monkeypatch):
    whole = policy_of(name, segment=LENGTH, compact_steps=LENGTH + 1)
    params = params_of(whole)
    seen = log(monkeypatch)
    plain = whole.rollout(params, *batch())
    assert not seen
    lengths = plain.mask.sum(axis=1)
    assert lengths.min() < 6 and lengths.max() == LENGTH  # early ends, and one to the last
    busy = policy_of(name, **BUSY[engine]).rollout(params, *batch())
    expected = {
        "segments": {"grow"}, "compaction": {"take"}, "refill": {"grow", "refill"},
        "all": {"grow", "take", "refill"},
    }[engine]  # fmt: skip
    assert expected <= set(seen)
    same(busy, plain)


def test_columns_left_behind_are_used_again(monkeypatch):
    """With many short completions after one another the columns would run out."""
    params = params_of(policy_of())
    prompts, mask, keys = batch(rows=32)
    plain = policy_of().rollout(params, prompts, mask, keys)
    seen = log(monkeypatch)
    busy = policy_of(slots=4, segment=8).rollout(params, prompts, mask, keys)
    assert seen.count("shift") > 1
    same(busy, plain)


@pytest.mark.smoke
def test_two_rollouts_are_bitwise_equal(monkeypatch):
    policy = policy_of(dtype="bfloat16", **BUSY["all"])
    params, seen = params_of(policy), log(monkeypatch)
    first, second = (policy.rollout(params, *batch(rows=20)) for _ in range(2))
    assert {"grow", "refill"} <= set(seen)
    for a, b in zip(first[:6], second[:6], strict=True):
        np.testing.assert_array_equal(a, b)


def test_waiting_completions_do_not_wait_for_the_last_row(monkeypatch):
    """Also where a CPU takes no fewer than 8 rows at a time."""
    policy, live = policy_of(dtype="bfloat16", slots=8), []
    refill = decoding.refill

    def spy(state, *args, **kwargs):
        live.append(int((~state.done).sum()))
        return refill(state, *args, **kwargs)

    monkeypatch.setattr(decoding, "refill", spy)
    policy.rollout(params_of(policy), *batch(rows=20))
    assert max(live) == 6  # two rows of eight have ended


def test_no_batch_shrinks_shortly_before_its_end(monkeypatch):
    """What counts are the steps to go once half of the rows have ended, not those at the start."""
    params, seen = params_of(policy_of()), log(monkeypatch)
    lengths = policy_of().rollout(params, *batch(rows=2)).mask.sum(axis=1)
    left = LENGTH - int(lengths.min())
    for steps in (left + 1, left):
        seen.clear()
        policy_of(compact_steps=steps).rollout(params, *batch(rows=2))
        assert ("take" in seen) == (steps == left)


@pytest.mark.parametrize("slots", [None, 8, 6])
def test_completions_of_one_prompt_are_those_of_the_prompt_repeated(slots):
    """Wherever a group is cut: all at once, 8 slots and then 2 at a time, or whole groups."""
    params, (prompts, mask, _) = params_of(policy_of()), batch(rows=4)
    keys = jax.random.split(jax.random.key(3), 12)
    shared = policy_of(slots=slots).rollout(params, prompts, mask, keys)
    repeated = policy_of().rollout(params, np.repeat(prompts, 3, 0), np.repeat(mask, 3, 0), keys)
    same(shared, repeated)
    np.testing.assert_array_equal(shared.prompts, repeated.prompts)


def test_fewer_completions_than_a_cpu_takes_at_a_time():
    """Three of one prompt: rows that fill up the batch belong to no group."""
    policy = policy_of(dtype="bfloat16")
    prompts, mask, keys = batch(rows=3)
    found = policy.rollout(params_of(policy), prompts[:1], mask[:1], keys)
    assert found.tokens.shape == (3, LENGTH) and found.mask[:, 0].all()


def test_columns_can_grow_one_at_a_time():
    params = params_of(policy_of())
    same(policy_of(segment=1).rollout(params, *batch(4)), policy_of().rollout(params, *batch(4)))


def test_prompts_and_keys_that_cannot_be_sampled_are_refused():
    policy = policy_of()
    params, (prompts, mask, keys) = params_of(policy), batch(rows=4)
    for bad_mask in (mask & False, mask[:, ::-1], mask[:, 1:]):
        with pytest.raises(ValueError, match="at least one token"):
            policy.rollout(params, prompts, bad_mask, keys)
    for count in (0, 3):
        with pytest.raises(ValueError, match=f"{count} keys are no multiple of 4 prompts"):
            policy.rollout(params, prompts, mask, keys[:count])


@pytest.mark.parametrize(
    ("field", "value"),
    [("segment", 0), ("slots", -1), ("prefill_chunk", 0), ("kv_cache", "fp4_kv")],
)
def test_settings_that_make_no_sense_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r}"):
        policy_of(**{field: value})


@pytest.mark.smoke
@pytest.mark.parametrize("name", MODELS)
def test_chunks_of_the_prompt_change_nothing(name):
    params = params_of(policy_of(name))
    whole = policy_of(name).rollout(params, *batch())
    same(policy_of(name, prefill_chunk=4).rollout(params, *batch()), whole)


def test_prompts_take_the_least_bucket():
    """Few widths, and tokens that do not notice."""
    mask = np.arange(256) >= 256 - np.array([[3], [40]])
    assert autoregressive.prompt_width(mask) == 64
    assert autoregressive.prompt_width(np.ones((2, 256), bool)) == 256
    assert autoregressive.prompt_width(mask[:, -12:]) == 12
    params = params_of(policy_of())
    prompts, mask, keys = batch(rows=4)
    wide = (np.pad(x, ((0, 0), (100, 0))) for x in (prompts, mask))
    found = policy_of().rollout(params, *wide, keys)
    same(found, policy_of().rollout(params, prompts, mask, keys))
    assert found.prompts.shape == (4, 109)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("name", "recipe"), [("qwen3", "none"), ("qwen3", "int8_head"), ("qwen3_5", "fp8")]
)
def test_the_copy_of_a_cpu_computes_what_the_stacked_one_does(name, recipe):
    """Blocks apart and kernels fused, against the layout of other platforms."""
    policy = policy_of(name)
    params = params_of(policy)
    apart, stacked = (sampling_copy(policy.model, params, recipe, p) for p in ("cpu", "tpu"))
    leaves = jax.tree.leaves(apart["layers"], is_leaf=lambda x: isinstance(x, Unstacked))
    assert all(isinstance(x, Unstacked) for x in leaves)
    ids = jax.random.randint(jax.random.key(5), (3, 12), 2, 20)
    a, b = (policy.model.logits(copy, ids) for copy in (apart, stacked))
    # A last-bit difference may move an activation to the neighbouring code.
    np.testing.assert_allclose(a, b, atol=1e-4 if recipe == "none" else 0.3, rtol=1e-4)
    assert np.quantile(np.abs(a - b), 0.5) < 1e-4
    if recipe == "none":
        same(policy.rollout(apart, *batch()), policy.rollout(stacked, *batch()))


@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(8, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("kv_cache", ["none", "int8_kv"])
def test_a_mesh_shares_the_rows_and_the_heads(data, fsdp, tensor, kv_cache, monkeypatch):
    mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data, fsdp, tensor))
    policy = policy_of(slots=8, segment=8, kv_cache=kv_cache)
    held = caches(monkeypatch)
    params = params_of(policy)
    shardings = mesh_lib.param_shardings(
        policy.model.param_axes(), params, mesh, mesh_lib.ROLLOUT_RULES
    )
    sharded = jax.device_put(params, shardings)
    found = policy.rollout(sharded, *batch(rows=16), mesh)
    monkeypatch.undo()
    alone = policy.rollout(params, *batch(rows=16))
    # Sums of another order may let a near tie fall the other way.
    equal = (found.tokens == alone.tokens).all(axis=1)
    assert equal.mean() > 0.8
    apart = np.abs(found.logps[equal] - alone.logps[equal])
    close = apart <= 1e-5 * (1 + np.abs(alone.logps[equal]))
    if kv_cache == "none":
        assert close.all()
    else:  # and what lies halfway between two codes may become the other one
        assert close.mean() > 0.98
        assert apart.max() < 1e-3
    assert {"grow", "refill"} <= held.keys()
    for cache in held.values():  # rows over the batch axes, heads over `tensor`
        leaves = jax.tree.leaves(cache)
        assert {x.sharding.shard_shape(x.shape)[-4:-2] for x in leaves} == {
            (leaves[0].shape[-4] // (data * fsdp), QWEN3.num_key_value_heads // tensor)
        }
    forced = jax.jit(policy.score)(sharded, jax.device_put(alone, mesh_lib.batch_sharding(mesh)))[0]
    expected = jax.jit(policy.score)(params, alone)[0]
    np.testing.assert_allclose(forced, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kv_format"), [("qwen3", "int8_kv"), ("qwen3", "fp8_kv"), ("qwen3_5", "int8_kv")]
)
def test_quantized_keys_and_values_are_close_and_are_used(name, kv_format):
    """They bend the log-probs a little, and no more in one arrangement of rows than in another."""
    policy = policy_of(name, kv_cache=kv_format)
    params = params_of(policy)
    found = policy.rollout(params, *batch())
    plain = jax.jit(policy.score)(params, found)[0]
    error = np.abs(found.logps - plain)[found.mask]
    assert 1e-5 < error.mean() < 0.2
    again = policy_of(name, kv_cache=kv_format, slots=4, prefill_chunk=4)
    same(again.rollout(params, *batch()), found)
    apart = policy.model.unstack(params)
    same(policy.rollout(apart, *batch()), found)


@pytest.mark.parametrize("kv_format", ["int8_kv", "fp8_kv"])
def test_cached_numbers_have_one_scale_a_token_and_head(kv_format):
    k, v = jax.random.normal(jax.random.key(0), (2, 3, 5, 2, 8)) * jnp.arange(1, 6)[:, None, None]
    held = cache_lib.entries(k, v, like=cache_lib.empty((3, 2, 9, 8), "float32", kv_format))
    for codes, x in zip(held, (k, v), strict=True):
        x = np.asarray(x, np.float64).swapaxes(1, 2)
        scale = np.abs(x).max(axis=-1, keepdims=True) / {"int8_kv": 127, "fp8_kv": 448}[kv_format]
        np.testing.assert_allclose(codes.scale, scale, rtol=1e-6)
        error = np.abs(np.asarray(codes.values, np.float64) * scale - x)
        assert (error <= scale * {"int8_kv": 0.51, "fp8_kv": 16.1}[kv_format]).all()
        assert error.max() > 0


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("platform", "kv_cache"),
    [("cpu", "none"), ("cpu", "int8_kv"), ("cpu", "fp8_kv"), ("tpu", "none")],
)
def test_decoding_holds_its_cache_once(platform, kv_cache, dtype):
    """Ahead of time: temporaries of the loop are far below the cache that it carries."""
    if jax.__version_info__ < (0, 12) and (platform, dtype) != ("tpu", "float32"):
        pytest.skip("XLA:CPU of jax below 0.12 copies what is read and then written")
    config = dataclasses.replace(QWEN3, num_hidden_layers=6)
    policy = Policy(
        build(config, dtype),
        dataclasses.replace(SAMPLING, max_new_tokens=2000, kv_cache=kv_cache),
    )
    setting = decoding.Setting(policy.model, policy.sampling, None)
    params = jax.eval_shape(
        lambda key: sampling_copy(policy.model, policy.model.init(key), "none", platform),
        jax.random.key(0),
    )
    begin = functools.partial(decoding.begin, setting=setting, columns=2048, repeats=1)
    state = jax.eval_shape(begin, params, *batch(), np.ones(8, bool))
    decode = decoding.program(decoding.decode, "cpu")
    compiled = decode.lower(params, state, np.int32(0), setting=setting).compile()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.cache))
    # Codes are widened to be multiplied, of one block at a time.
    widened = 0 if kv_cache == "none" else 8 * QWEN3.num_key_value_heads * 2048 * QWEN3.head_dim * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 0.25 * held + 2 * widened
