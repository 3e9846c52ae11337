"""Exact expectations: every sequence of a tabular policy, weighted by its probability.

The expectation over the rollout policy mu of a sum over tokens is the sum over all sequences y of
mu(y) times it. So each sequence is one row with advantage mu(y) R(y), and the loss divides by the
constant 1 (`sequence_sum_norm`): a divisor that depends on a sequence's own length, or on the
lengths that a batch happened to hold, would not give the policy gradient.

The reference is dynamic programming over prefixes, which never visits a whole sequence.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ais_oracle import close

from ais_jax import AISConfig, ais_loss

VOCABULARY, LENGTH, STOP = 3, 4, 0
PRODUCT = AISConfig(
    level="sequence_product",
    cap=None,
    coefficient="fixed",
    aggregation="sequence_sum_norm",
    max_length=LENGTH,
)
TOKEN = dataclasses.replace(PRODUCT, level="token")


def softmax(x):
    p = np.exp(x - x.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


class Problem:
    """A policy with one row of logits per prefix, a perturbed copy, a return per sequence."""

    def __init__(self, stops: bool, noise: float):
        rng = np.random.default_rng(7)
        every = itertools.product(range(VOCABULARY), repeat=LENGTH)
        cut = (self.cut(y) if stops else y for y in every)
        self.sequences = sorted(set(cut))
        self.returns = {y: rng.normal() + 0.5 * len(y) for y in self.sequences}
        self.prefixes = sorted({y[:t] for y in self.sequences for t in range(len(y))})
        self.index = {prefix: i for i, prefix in enumerate(self.prefixes)}
        self.theta = rng.normal(size=(len(self.prefixes), VOCABULARY))
        self.mu = softmax(self.theta + noise * rng.normal(size=self.theta.shape))
        self.pi = softmax(self.theta)

        shape = (len(self.sequences), LENGTH)
        self.mask = np.zeros(shape, bool)
        self.rows, self.tokens = np.zeros(shape, int), np.zeros(shape, int)
        for i, y in enumerate(self.sequences):
            for t, token in enumerate(y):
                self.mask[i, t], self.tokens[i, t] = True, token
                self.rows[i, t] = self.index[y[:t]]
        self.rollout_logps = np.log(self.mu)[self.rows, self.tokens]
        probability = np.exp(np.where(self.mask, self.rollout_logps, 0).sum(axis=1))
        close(probability.sum(), 1, 1e-14)
        self.advantages = probability * np.array([self.returns[y] for y in self.sequences])

    @staticmethod
    def cut(y):
        return y[: y.index(STOP) + 1] if STOP in y else y

    def reach(self, policy):
        """[S] probability that a sequence passes through each prefix."""
        reach = np.zeros(len(self.prefixes))
        for prefix in self.prefixes:
            steps = (policy[self.index[prefix[:t]], a] for t, a in enumerate(prefix))
            reach[self.index[prefix]] = math.prod(steps)
        return reach

    def action_values(self, policy):
        """[S, V] expected return after each token at each prefix, from the longest back."""
        q = np.zeros(self.theta.shape)
        for prefix in sorted(self.prefixes, key=len, reverse=True):
            for a in range(VOCABULARY):
                longer = (*prefix, a)
                done = longer in self.returns
                i = None if done else self.index[longer]
                q[self.index[prefix], a] = self.returns[longer] if done else policy[i] @ q[i]
        return q

    def score_gradient(self, states, actions, q):
        """sum_s states(s) sum_a actions(a | s) q(s, a) d log pi(a | s) / d theta."""
        weighted = states[:, None] * actions * q
        return weighted - self.pi * weighted.sum(axis=1, keepdims=True)

    def gradient(self, config, **kwargs):
        """[S, V] minus the gradient of the library's loss, all sequences enumerated."""

        @jax.jit
        @jax.grad
        def grad(theta):
            logps = jax.nn.log_softmax(theta)[self.rows, self.tokens]
            arguments = (logps, self.rollout_logps, self.advantages, self.mask)
            return -ais_loss(*arguments, config=config, **kwargs).loss

        with jax.enable_x64(True):
            return np.asarray(grad(jnp.asarray(self.theta)))


@functools.cache
def problem(stops=True, noise=0.4):
    return Problem(stops, noise)


def exact(p):
    return p.score_gradient(p.reach(p.pi), p.pi, p.action_values(p.pi))


@pytest.mark.smoke
@pytest.mark.parametrize("stops", [False, True])
def test_product_weights_give_the_exact_policy_gradient(stops):
    p = problem(stops)
    assert len(p.sequences) == (31 if stops else VOCABULARY**LENGTH)
    got = p.gradient(PRODUCT, denominator=1.0)
    close(got, exact(p), 1e-12)
    assert np.abs(got).max() > 0.05


@pytest.mark.parametrize("stops", [False, True])
def test_token_weights_have_their_enumerated_bias(stops):
    """They correct each token's choice, and neither how often a prefix comes up nor its value."""
    p = problem(stops)
    biased = p.score_gradient(p.reach(p.mu), p.pi, p.action_values(p.mu))
    got = p.gradient(TOKEN, denominator=1.0)
    close(got, biased, 1e-12)
    bias = np.linalg.norm(got - exact(p)) / np.linalg.norm(exact(p))
    assert bias > 0.05


def test_no_correction_has_its_enumerated_bias():
    p = problem()
    uncorrected = p.score_gradient(p.reach(p.mu), p.mu, p.action_values(p.mu))
    plain = dataclasses.replace(TOKEN, fixed_alpha=0.0)
    close(p.gradient(plain, denominator=1.0), uncorrected, 1e-12)
    # Between the ends the expected gradient is the mixture of the two.
    mixed = dataclasses.replace(PRODUCT, fixed_alpha=0.37)
    close(p.gradient(mixed, denominator=1.0), 0.63 * uncorrected + 0.37 * exact(p), 1e-12)


def test_a_cap_costs_the_gradient_of_what_it_cuts_off():
    """bias = - E_mu[(W - C)+ R d log pi]."""
    p, cap = problem(), 1.2
    cut = np.zeros(p.theta.shape)
    for i, y in enumerate(p.sequences):
        at = [p.index[y[:t]] for t in range(len(y))]
        ratio = math.prod(p.pi[s, a] / p.mu[s, a] for s, a in zip(at, y, strict=True))
        for s, a in zip(at, y, strict=True):
            one_hot = np.eye(VOCABULARY)[a]
            cut[s] += p.advantages[i] * max(ratio - cap, 0) * (one_hot - p.pi[s])
    capped = dataclasses.replace(PRODUCT, cap=cap)
    close(p.gradient(capped, denominator=1.0), exact(p) - cut, 1e-12)
    assert np.abs(cut).max() > 0.01


def test_only_a_constant_divisor_gives_the_policy_gradient():
    """Whatever the scale, a mean over each sequence's own tokens points elsewhere."""
    p = problem(stops=True)
    own_length = dataclasses.replace(PRODUCT, aggregation="sequence_mean", max_length=None)
    want = exact(p) / np.linalg.norm(exact(p))
    for config, same in [(PRODUCT, True), (own_length, False)]:
        got = p.gradient(config)
        cosine = np.sum(got * want) / np.linalg.norm(got)
        assert (cosine > 1 - 1e-12) == same
    close(p.gradient(PRODUCT) * len(p.sequences) * LENGTH, exact(p), 1e-12)


def test_bias_falls_from_none_to_token_to_product():
    p = problem(noise=0.2)
    plain = dataclasses.replace(TOKEN, fixed_alpha=0.0)
    none, token, product = (
        np.linalg.norm(p.gradient(config, denominator=1.0) - exact(p))
        for config in (plain, TOKEN, PRODUCT)
    )
    assert none > token > 1e-3 > 1e-12 > product
