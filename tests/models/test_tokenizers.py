import numpy as np
import pytest

from ais_jax.errors import UserError
from ais_jax.models.tokenizers import CharTokenizer, left_pad

TOKENIZER = CharTokenizer("0123+-*= ")


def test_round_trip_and_end():
    ids = TOKENIZER.encode("1+2=3")
    assert TOKENIZER.decode(ids) == "1+2=3"
    assert TOKENIZER.decode([0, 0, *ids, TOKENIZER.eos_id, *ids]) == "1+2=3"
    assert TOKENIZER.size == 11
    assert max(TOKENIZER.encode(TOKENIZER.alphabet)) == TOKENIZER.size - 1


def test_unknown_character_is_named():
    with pytest.raises(UserError, match="'x'"):
        TOKENIZER.encode("1+x")


def test_left_pad():
    ids, mask = left_pad([[5, 6], [], [7, 8, 9]], 3, pad_id=0)
    np.testing.assert_array_equal(ids, [[0, 5, 6], [0, 0, 0], [7, 8, 9]])
    np.testing.assert_array_equal(mask, [[0, 1, 1], [0, 0, 0], [1, 1, 1]])
    with pytest.raises(UserError, match="max_prompt_tokens=2"):
        left_pad([[1, 2, 3]], 2, pad_id=0)
