"""The masked-diffusion sampler against a NumPy float64 sampler, and what it must not depend on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_oracle import (
    CACHED,
    COUNT,
    EOS,
    EXACT,
    GREEDY,
    LENGTH,
    MASK,
    PAD,
    SAMPLING,
    VOCAB,
    batch,
    jitted,
    params_of,
    policy_of,
    reference_of,
    rollout_of,
)

from ais_jax import mesh as mesh_lib
from ais_jax.errors import UserError
from ais_jax.sampling import DiffusionConfig, Policy, diffusion

ALL = EXACT | GREEDY | CACHED
SMOKE = dict.fromkeys(["uneven_shares", "dual_guided_threshold"], pytest.mark.smoke)


@pytest.mark.parametrize("name", [pytest.param(x, marks=SMOKE.get(x, ())) for x in ALL])
def test_sampling_equals_the_float64_sampler_step_by_step(name):
    rollout, rows = rollout_of(ALL[name]), reference_of(ALL[name])
    assert rollout.tokens.dtype == rollout.step_map.dtype == jnp.int32
    assert rollout.logps.dtype == jnp.float32
    np.testing.assert_array_equal(rollout.tokens, [r.tokens for r in rows])
    np.testing.assert_array_equal(rollout.step_map, [r.step_map for r in rows])
    np.testing.assert_array_equal(rollout.forwards, [r.forwards for r in rows])
    np.testing.assert_allclose(rollout.logps, [r.logps for r in rows], atol=2e-5)


def test_rows_finish_at_steps_of_their_own():
    """Without this the comparisons above would say little of the parallel schedules."""
    for name in ("threshold", "factor_guided", "dual_guided_threshold"):
        assert len(set(rollout_of(ALL[name]).forwards.tolist())) > 2, name


@pytest.mark.parametrize("cache", ["dual", "prefix"])
def test_a_cache_is_exact_at_the_first_step_of_a_block(cache):
    """Later steps see old keys and values: scored without a cache they are another policy's."""
    policy = ALL[cache]
    rollout = rollout_of(policy)
    scored, _ = jitted(ALL["one_token_a_step"])[1](
        params_of(), ALL["one_token_a_step"].plan(rollout, batch()[2])
    )
    error = np.abs(np.asarray(scored - rollout.logps))
    first = np.asarray(rollout.step_map) % 4 == 0
    assert error[first].max() < 1e-5
    assert np.median(error[~first]) > 1e-3


@pytest.mark.parametrize("cache", ["dual", "prefix"])
def test_a_cache_changes_nothing_if_a_block_is_one_step(cache):
    cached, plain = (rollout_of(policy_of(cache=x, steps=2)) for x in (cache, "none"))
    np.testing.assert_array_equal(cached.tokens, plain.tokens)
    np.testing.assert_allclose(cached.logps, plain.logps, atol=1e-5)


@pytest.mark.parametrize("name", ["threshold", "random", "prefix_guided"])
def test_a_row_depends_on_its_own_prompt_and_key_alone(name):
    """Other rows beside it, fewer of them, wider padding: rows may need different step counts."""
    whole, (prompts, mask, keys) = rollout_of(ALL[name]), batch()
    order = np.array([4, 1, 6])
    wide, wide_mask = (jnp.pad(x[order], ((0, 0), (3, 0))) for x in (prompts, mask))
    part = jitted(ALL[name])[0](params_of(), wide, wide_mask, keys[order])
    for field in ("tokens", "step_map", "forwards"):
        np.testing.assert_array_equal(getattr(part, field), getattr(whole, field)[order])
    np.testing.assert_allclose(part.logps, whole.logps[order], atol=1e-5)

    other = jitted(ALL[name])[0](params_of(), wide, wide_mask, keys[order[::-1]])
    assert (np.asarray(other.tokens) != np.asarray(part.tokens)).any()


@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(8, 1, 1), (2, 2, 2)])
def test_log_probs_agree_across_meshes(data, fsdp, tensor):
    policy = ALL["threshold"]
    rollout = policy.plan(rollout_of(policy), batch()[2])
    mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data, fsdp, tensor))
    axes = policy.model.param_axes()
    shardings = mesh_lib.param_shardings(axes, params_of(), mesh, mesh_lib.TRAIN_RULES)
    sharded = jax.device_put(params_of(), shardings)
    rows = mesh_lib.batch_sharding(mesh)
    logps, entropy = jitted(policy)[1](sharded, jax.device_put(rollout, rows))
    expected = jitted(policy)[1](params_of(), rollout)
    np.testing.assert_allclose(logps, expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(entropy, expected[1], rtol=1e-5, atol=1e-5)
    again = jitted(policy)[0](sharded, *jax.device_put(batch(), rows))
    assert (np.asarray(again.tokens) == np.asarray(rollout.tokens)).mean() > 0.95


def test_forbidden_ids_are_never_sampled_and_the_mask_ends_with_the_end_token():
    """A model that would choose nothing but what is forbidden, and has no favourite otherwise."""
    forbidden = np.array([PAD, MASK, *range(COUNT, VOCAB)])
    head = 0.2 * params_of()["lm_head"]
    params = {**params_of(), "lm_head": head.at[:, forbidden].multiply(20.0)}
    policy, rows = ALL["random"], 256
    rollout = jitted(policy)[0](params, *batch(rows))
    tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
    assert (policy.model.logits(params, rollout.tokens).argmax(-1) == MASK).any()
    assert set(np.unique(tokens)) <= set(range(1, COUNT)) - {MASK}
    ended = (tokens == EOS).any(axis=1)
    length = np.where(ended, (tokens == EOS).argmax(axis=1) + 1, LENGTH)
    assert 20 < ended.sum() < 236
    assert len(set(length[ended])) == LENGTH
    np.testing.assert_array_equal(mask, np.arange(LENGTH) < length[:, None])
    np.testing.assert_array_equal(rollout.truncated, ~ended)
    # What stands behind the end token was sampled like the rest and stays.
    assert np.isfinite(rollout.logps).all()
    assert (np.asarray(rollout.logps)[~mask] < 0).all()
    assert len(np.unique(tokens[~mask])) > 5


def test_an_end_token_that_is_padding_too_stays_allowed():
    ids = np.arange(VOCAB)
    both = dataclasses.replace(SAMPLING, pad_id=EOS).allowed_ids(VOCAB)
    np.testing.assert_array_equal(both, (ids < COUNT) & (ids != MASK))
    apart = SAMPLING.allowed_ids(VOCAB)
    np.testing.assert_array_equal(apart, (ids < COUNT) & (ids != MASK) & (ids != PAD))


def test_of_equally_sure_positions_the_leftmost_is_first():
    """A model that knows nothing: then a choice is certain and adds nothing to its log-probs."""
    policy = ALL["selection"]
    params = {**params_of(), "lm_head": jnp.zeros_like(params_of()["lm_head"])}
    rollout = jitted(policy)[0](params, *batch())
    np.testing.assert_array_equal(rollout.step_map, np.tile([0, 0, 1, 2, 3, 3, 4, 5], (8, 1)))
    np.testing.assert_allclose(rollout.logps, -np.log(COUNT - 2), rtol=1e-6)
    scored, _ = jitted(policy)[1](params, policy.plan(rollout, batch()[2]))
    np.testing.assert_allclose(scored, -np.log(COUNT - 2), rtol=1e-6)


def test_noise_does_not_repeat():
    """Steps and rows with the same canvas must not draw the same tokens."""
    policy, (prompts, mask, keys) = ALL["one_token_a_step"], batch()
    flat = {**params_of(), "lm_head": jnp.zeros_like(params_of()["lm_head"])}
    prompts, mask = (jnp.broadcast_to(x[:1], x.shape) for x in (prompts, mask))
    tokens = np.asarray(jitted(policy)[0](flat, prompts, mask, keys).tokens)
    assert len({tuple(row) for row in tokens}) == len(tokens)
    assert min(len(set(row)) for row in tokens.tolist()) > 3


BAD_SETTINGS = [
    ({"remasking": "Random"}, "remasking='Random' must be one of low_confidence, random, ar"),
    ({"estimator": "elbo", "canvases": 2}, "canvases=2 .* lower elbo_samples instead"),
    ({"draws": 2}, "draws=2: with estimator=trajectory nothing is drawn .* take 1"),
    ({"cache": "both"}, "cache='both' must be one of none, prefix, dual"),
    ({"block_length": 0}, "block_length=0 must be at least 1"),
    ({"steps": 0}, "steps=0 must be at least 1"),
    ({"canvases": 0}, "canvases=0 must be at least 1"),
    ({"elbo_samples": 0}, "elbo_samples=0 must be at least 1"),
    ({"draws": 0}, "draws=0 must be at least 1"),
    ({"cfg_scale": -0.5}, "cfg_scale=-0.5 must be at least 0"),
    ({"segments": -1}, "segments=-1 must be at least 0"),
    ({"factor": 0.0}, "factor=0.0 must be above 0"),
    ({"threshold": 1.5}, "threshold=1.5 must be from 0 to 1"),
    ({"prompt_masking": 1.1}, "prompt_masking=1.1 must be from 0 to 1"),
    ({"prompt_masking": -0.1}, "prompt_masking=-0.1 must be at least 0"),
    (
        {"schedule": "factor", "remasking": "random"},
        "schedule='factor'.*remasking='random' must be low_confidence, or the schedule static",
    ),
    *(
        ({"selection": True, "segments": 0, **wrong}, f"selection=true needs .*{remedy}")
        for wrong, remedy in (
            ({"segments": 8}, "segments=0"),
            ({"estimator": "elbo"}, "estimator=trajectory"),
            ({"schedule": "threshold"}, "schedule=static"),
            ({"remasking": "ar"}, "remasking=low_confidence"),
            ({"cache": "dual"}, "cache=none"),
        )
    ),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**settings)


@pytest.mark.parametrize(
    ("length", "settings", "message"),
    [
        (33, {}, r"block_length=32 does not divide the 33 tokens.*or the length 32"),
        (8, {}, r"block_length=32 does not divide the 8 tokens.*or the length 32"),
        (8, {"block_length": 4, "steps": 9}, "steps=9 is above the 8 tokens"),
        (8, {"block_length": 2, "steps": 6}, r"steps=6 is not a multiple of the 4 blocks.*take 4"),
        (8, {"block_length": 2, "steps": 3}, r"steps=3 is not a multiple of the 4 blocks.*take 4"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(length, settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SAMPLING, max_new_tokens=length, diffusion=DiffusionConfig(**settings))


def test_another_length_keeps_the_tokens_a_step():
    config = dataclasses.replace(
        SAMPLING, max_new_tokens=32, diffusion=DiffusionConfig(block_length=8, steps=12)
    )
    larger = config.resized(64)
    assert (larger.max_new_tokens, larger.settings.steps) == (64, 24)
    assert config.resized(32) == config
    with pytest.raises(ValueError, match=r"steps=12 for 32 .* whole .* for 20.*common ratio"):
        config.resized(20)
    ignored = DiffusionConfig(block_length=8, steps=12, schedule="threshold")
    assert dataclasses.replace(config, diffusion=ignored).resized(40).settings == ignored
    with pytest.raises(ValueError, match="block_length=8 does not divide the 36 tokens"):
        dataclasses.replace(config, diffusion=DiffusionConfig(block_length=8)).resized(36)


def test_a_mask_id_outside_the_vocabulary_is_refused():
    for mask_id in (VOCAB, -1):
        policy = Policy(
            policy_of().model, dataclasses.replace(policy_of().sampling, mask_id=mask_id)
        )
        with pytest.raises(ValueError, match=f"mask_token_id={mask_id} is no id of a vocab.*set"):
            policy.rollout(params_of(), *batch())
    dataclasses.replace(SAMPLING, mask_id=-1, diffusion=None).check_vocabulary(VOCAB)
    with pytest.raises(ValueError, match=f"mask_token_id={EOS} is an end token or padding too"):
        dataclasses.replace(SAMPLING, mask_id=EOS).check_vocabulary(VOCAB)


def test_a_prompt_with_the_mask_token_is_refused():
    with pytest.raises(UserError, match=rf"mask token \(id {MASK}\).*remove it"):
        diffusion.check_prompt([3, MASK, 5], MASK)
    with pytest.raises(UserError, match="mask token"):
        diffusion.check_prompt(np.array([3, MASK]), MASK)
    diffusion.check_prompt([3, 5], MASK)
    diffusion.check_prompt([3, MASK], None)


@pytest.mark.parametrize(
    ("settings", "recorded", "unbiased"),
    [
        ({"segments": 0}, True, False),
        ({"segments": 0, "selection": True}, True, False),
        ({"segments": 0, "remasking": "random"}, True, False),
        ({"segments": 0, "remasking": "ar"}, True, True),
        ({"segments": 8, "remasking": "random"}, False, False),
        ({"segments": 0, "estimator": "ar_order", "remasking": "ar"}, False, False),
    ],
)
def test_what_a_policy_says_of_its_estimator(settings, recorded, unbiased):
    config = dataclasses.replace(SAMPLING, diffusion=DiffusionConfig(block_length=4, **settings))
    policy = Policy(policy_of().model, config)
    assert (policy.recorded, policy.unbiased) == (recorded, unbiased)
