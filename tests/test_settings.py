"""Settings: what is accepted, and the one line a person reads for everything else."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, Literal

import pytest
import yaml
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ais_jax.ais_config import AISConfig
from ais_jax.errors import UserError
from ais_jax.settings import (
    apply_overrides,
    build,
    describe,
    load,
    load_yaml,
    parse_override,
    replace,
    save_yaml,
    setting,
    to_dict,
)


@dataclasses.dataclass(frozen=True)
class Schedule:
    warmup: int = setting(10, "steps")
    shape: Literal["cosine", "linear"] = setting("cosine", "decay")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    learning_rate: float = setting(1e-6, "peak")
    betas: tuple[float, ...] = setting((0.9, 0.95), "Adam's")
    clip: float | None = setting(1.0, "null is off")
    schedule: Schedule = setting(default_factory=Schedule, doc="decay")


@dataclasses.dataclass(frozen=True)
class Adapter:
    rank: int = setting(doc="rank")
    targets: tuple[str, ...] = setting(("q", "v"), "projections", choices=("q", "k", "v"))


@dataclasses.dataclass(frozen=True)
class Train:
    steps: int = setting(100, "updates")
    seed: int | None = setting(None, "null draws one")
    remat: bool = setting(False, "recompute")
    mode: str = setting("off", "quantization", choices=("off", "int8", "fp8"))
    layers: tuple[int, ...] | None = setting(None, "null is all")
    scale: float | str = setting("auto", "a number, or auto")
    size: int | Literal["full"] = setting("full", "rows")

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be\nat least 1")


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = setting("run", "of the run")
    train: Train = setting(default_factory=Train, doc="loop")
    optimizer: Optimizer = setting(default_factory=Optimizer, doc="optimizer")
    adapter: Adapter | None = setting(None, "null trains every weight")
    ais: AISConfig = setting(default_factory=AISConfig, doc="correction")
    extra: dict[str, Any] = setting(default_factory=dict, doc="passed through")


def error_of(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert message and "\n" not in message and message.isprintable(), message
    return message


def write(folder, text: str | bytes, name: str = "run.yaml"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def dataclass_with(annotation, **kwargs):
    field = ("x", annotation, setting(doc="x", **kwargs))
    return dataclasses.make_dataclass("Sample", [field], frozen=True)


# What is accepted


@pytest.mark.smoke
def test_every_kind_of_field_is_read(tmp_path):
    path = write(
        tmp_path,
        """
name: a
train: {steps: 7, seed: 3, remat: on, mode: "off", layers: [1, 2], scale: 1e-4, size: full}
optimizer:
  learning_rate: 2
  betas: [0, 1e-1]
  clip: null
  schedule: {shape: linear}
adapter: {rank: 8, targets: [k]}
ais: {level: sequence_product, severity_scale: auto}
extra: {deep: {list: [1, two, null]}}
""",
    )
    assert load(Config, path) == Config(
        name="a",
        train=Train(7, 3, True, "off", (1, 2), 1e-4, "full"),
        optimizer=Optimizer(2.0, (0.0, 0.1), None, Schedule(10, "linear")),
        adapter=Adapter(8, ("k",)),
        ais=AISConfig(level="sequence_product", coefficient="shrinkage", severity_scale="auto"),
        extra={"deep": {"list": [1, "two", None]}},
    )


@pytest.mark.parametrize("section", [{}, {"train": None}, {"train": {}}])
def test_absent_null_and_empty_sections_take_the_defaults(section):
    assert build(Config, section) == Config()


@pytest.mark.parametrize("section", [{}, {"adapter": None}])
def test_an_optional_section_is_off_when_absent_or_null(section):
    assert build(Config, section).adapter is None


def test_values_have_the_type_of_the_field():
    config = build(
        Config,
        {"optimizer": {"learning_rate": 1, "betas": [1, 0]}, "train": {"scale": 3}},
    )
    assert type(config.optimizer.learning_rate) is float
    assert list(map(type, config.optimizer.betas)) == [float, float]
    assert type(config.optimizer.betas) is tuple
    assert type(config.train.scale) is float


def test_a_built_config_is_frozen_and_shares_nothing_with_its_data():
    data = {"extra": {"list": [1]}}
    config = build(Config, data)
    data["extra"]["list"].append(2)
    assert config.extra == {"list": [1]}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.steps = 3


NUMERALS = st.from_regex(
    r"[-+]?([1-9][0-9]{0,3}|0)?(\.[0-9]{0,3})?([eE][-+]?[0-9]{1,2})?", fullmatch=True
)


@given(NUMERALS)
@example("1e-4")
@example("1.5e3")
@example("-.5")
@example("5")
@example("1.")
def test_a_number_in_yaml_is_what_python_reads(numeral):
    try:
        expected = float(numeral)
    except ValueError:
        return
    data = yaml.safe_load(f"learning_rate: {numeral}")
    assert build(Optimizer, data).learning_rate == expected
    assert build(Train, {"scale": data["learning_rate"]}).scale == expected
    key, value = parse_override(f"learning_rate={numeral}")
    assert build(Optimizer, apply_overrides({}, [(key, value)])).learning_rate == expected


# What a person may get wrong

WRONG = [
    # types
    ("train: {steps: '8'}", "train.steps", "a whole number", "'8'", "without quotes"),
    ("train: {steps: 8.0}", "train.steps", "a whole number", "8.0"),
    ("train: {steps: true}", "train.steps", "a whole number", "true"),
    ("train: {steps: null}", "train.steps", "a whole number", "null"),
    ("train: {steps: [8]}", "train.steps", "a whole number", "[8]"),
    ("train: {steps: 1e3}", "train.steps", "a whole number", "'1e3'"),
    ("train: {seed: x}", "train.seed", "a whole number or null", "'x'"),
    ("train: {remat: 1}", "train.remat", "true or false", "found 1"),
    ("train: {remat: 'yes'}", "train.remat", "true or false", "'yes'"),
    ("train: {layers: 3}", "train.layers", "a list (each a whole number) or null", "[brackets]"),
    ("train: {layers: [1, true]}", "train.layers", "[1, True]"),
    ("train: {layers: {a: 1}}", "train.layers", "{'a': 1}"),
    ("train: {scale: [1]}", "train.scale", "a number or text", "[1]"),
    ("train: {size: half}", "train.size", "a whole number or one of full", "'half'"),
    ("optimizer: {learning_rate: fast}", "optimizer.learning_rate", "a number", "'fast'"),
    ("optimizer: {learning_rate: '0.5'}", "optimizer.learning_rate", "'0.5'", "without quotes"),
    ("optimizer: {learning_rate: true}", "optimizer.learning_rate", "a number", "true"),
    ("optimizer: {clip: big}", "optimizer.clip", "a number or null", "'big'"),
    ("optimizer: {betas: 0.9}", "optimizer.betas", "a list (each a number)", "[brackets]"),
    ("optimizer: {betas: '12'}", "optimizer.betas", "a list (each a number)", "'12'"),
    ("extra: [1]", "extra", "a mapping", "[1]"),
    ("adapter: {rank: 1, targets: qv}", "adapter.targets", "a list", "'qv'", "[brackets]"),
    # numbers that are none
    ("optimizer: {learning_rate: .nan}", "optimizer.learning_rate", "nan", "must be finite"),
    ("optimizer: {learning_rate: -.inf}", "optimizer.learning_rate", "-inf", "must be finite"),
    ("optimizer: {learning_rate: 1e999}", "optimizer.learning_rate", "a number", "'1e999'"),
    ("optimizer: {learning_rate: nan}", "optimizer.learning_rate", "a number", "'nan'"),
    ("optimizer: {learning_rate: 1" + "0" * 400 + "}", "optimizer.learning_rate", "a number"),
    ("optimizer: {clip: .inf}", "optimizer.clip", "a number or null", "must be finite"),
    ("train: {scale: .nan}", "train.scale", "a number or text", "nan"),
    # choices
    ("train: {mode: int4}", "train.mode", "one of off, int8, fp8", "'int4'"),
    ("adapter: {rank: 1, targets: [q, o]}", "adapter.targets", "one of q, k, v", "['q', 'o']"),
    ("optimizer: {schedule: {shape: flat}}", "optimizer.schedule.shape", "cosine, linear", "flat"),
    # YAML's reading of plain text
    ("name: no", "name: expected text", "found false", "yes, no, on and off", "quotes"),
    ("name: on", "name: expected text", "found true", "quotes"),
    ("train: {mode: off}", "train.mode", "found false", "one of off, int8, fp8", "quotes"),
    ("adapter: {rank: 1, targets: [yes]}", "adapter.targets", "[True]", "quotes"),
    ("name: 123", "name: expected text", "found 123", "put text in quotes"),
    ("name: 1.5", "name: expected text", "found 1.5", "put text in quotes"),
    ("name: 2024-01-31", "name: expected text", "found 2024-01-31:", "put text in quotes"),
    ("name: null", "name: expected text", "found null"),
    ("name: 2024-13-31", "line 1, column 7", "'2024-13-31'", "timestamp", "put text in quotes"),
    ("name: 010", "line 1, column 7", "010", "octal", "put text in quotes"),
    ("train:\n  steps: 010", "line 2, column 10", "010", "octal", "decimal"),
    ("train:\n  steps: 12:30", "line 2, column 10", "12:30", "base 60"),
    ("optimizer: {clip: 1:30.5}", "line 1, column 19", "1:30.5", "base 60"),
    # sections
    ("train: 3", "train: expected a section", "found 3"),
    ("train: [a]", "train: expected a section", "['a']"),
    ("train: ''", "train: expected a section", "''"),
    ("adapter: true", "adapter: expected a section", "true"),
    ("adapter: {}", "adapter.rank", "required", "a whole number"),
    # a check of the section itself
    ("train: {steps: 0}", "train: steps=0 must be at least 1"),
    ("ais: {cap: -1}", "ais: cap=-1.0 must be above 0, or null"),
    # keys
    ("train: {step: 3}", "train.step: unknown key", "did you mean train.steps?"),
    ("train: {lr: 3}", "train.lr: unknown key", "did you mean optimizer.learning_rate?"),
    ("learning_rate: 3", "learning_rate: unknown", "did you mean optimizer.learning_rate?"),
    ("optimiser: {}", "optimiser: unknown", "did you mean optimizer?"),
    ("optimizer: {warmup: 3}", "optimizer.warmup", "did you mean optimizer.schedule.warmup?"),
    ("train_steps: 3", "train_steps: unknown", "did you mean train.steps?"),
    ("train: {zzz: 3}", "train.zzz: unknown key; the keys here are steps, seed, remat, mode"),
    ("train.steps: 3", "train.steps: unknown key", "write steps on a line below train"),
    ("train: {'': 3}", "train.'': unknown key"),
    ('train: {"a\\nb": 3}', "train.a b: unknown key"),
    ('train: {"\\e[31m": 3}', r"train.\x1b[31m: unknown key"),
    ("train: {1: 3}", "line 1", "key '1' is not text", "quotes"),
    ("on: 3", "line 1", "key 'on' is not text", "quotes"),
    ("~: 3", "line 1", "key '~' is not text", "quotes"),
    ("[1]: 3", "line 1", "key a collection is not text"),
    # the file
    ("train: {steps: 1}\ntrain: {}", "line 2, column 1", "duplicate key 'train'"),
    ("train:\n  steps: 1\n  seed: 2\n  steps: 3", "line 4, column 3", "duplicate key 'steps'"),
    ("a: &x {steps: 1}\nb: {<<: *x, <<: *x}", "line 2", "duplicate key '<<'"),
    ("extra: &x {a: *x}", "line 1", "recursive"),
    ("extra: &x {a: [*x]}", "line 1", "recursive"),
    ("train: [1", "line 1", "expected ',' or ']'"),
    ("a:\n\tb: 1", "line 2, column 1", r"'\t' that cannot start any token"),
    ("a: b: c", "line 1, column 5", "mapping values are not allowed here"),
    ("a: *b", "line 1, column 4", "undefined alias"),
    ("a: 1\n---\nb: 1", "line 2", "single document"),
    ("a: !!python/object/apply:os.getcwd []", "line 1", "constructor", "python/object"),
    ("a: !!bool maybe", "line 1", "'maybe' is not a valid bool"),
    ("a: !!int ''", "line 1", "'' is not a valid int"),
    ("a: !!timestamp x", "line 1", "'x' is not a valid timestamp"),
    ("a: !!int [1]", "line 1", "expected a scalar node"),
    ("a: " + "1" * 5000, "line 1, column 4", "is not a valid int"),
    ("train: {steps: 0x" + "f" * 9000 + ", seed: a}", "train.seed"),
    ("train: {remat: 0x" + "f" * 9000 + "}", "train.remat", "thousands of digits"),
    ("a: " + "[" * 20000, "nested too deeply"),
    ("a: \x07", "#x0007", "not allowed"),
    ("", "found nothing", "write {} to take every default"),
    ("# only a comment", "found nothing"),
    ("- a", "expected lines of key: value", "['a']"),
    ("just text", "expected lines of key: value", "'just text'"),
]


@pytest.mark.parametrize("text, fragments", [(text, rest) for text, *rest in WRONG])
def test_a_mistake_in_a_file_is_explained_in_one_line(tmp_path, text, fragments):
    path = write(tmp_path, text)
    message = error_of(load, Config, path)
    assert message.startswith(f"{path}: ") and len(message) < 400 + len(str(path))
    for fragment in fragments:
        assert fragment in message


def test_a_file_that_is_not_there(tmp_path):
    (tmp_path / "grpo_small.yaml").write_text("{}")
    message = error_of(load_yaml, tmp_path / "grpo_smal.yaml")
    assert f"{tmp_path}/grpo_smal.yaml: cannot be read: No such file" in message
    assert f"did you mean {tmp_path}/grpo_small.yaml?" in message
    assert "grpo_small.yaml?" in error_of(load_yaml, tmp_path / "grpo_small")
    assert "did you mean" not in error_of(load_yaml, tmp_path / "zzz.yaml")
    assert "No such file" in error_of(load_yaml, tmp_path / "none" / "a.yaml")


def test_paths_that_are_no_files(tmp_path):
    path = write(tmp_path, "{}")
    assert f"{tmp_path}: cannot be read: Is a directory" in error_of(load_yaml, tmp_path)
    assert error_of(load_yaml, "").startswith(".: cannot be read: Is a directory")
    (tmp_path / "below.yaml").mkdir()
    assert error_of(load_yaml, tmp_path / "below.yaml").endswith("Is a directory")
    assert "Not a directory" in error_of(load_yaml, path / "below")
    assert "File name too long" in error_of(load_yaml, tmp_path / ("a" * 300))
    assert "null byte" in error_of(load_yaml, "a\0b")


def test_an_encoding_other_than_utf8(tmp_path):
    message = error_of(load_yaml, write(tmp_path, b"a: 1\nb: caf\xe9\n"))
    assert "run.yaml: line 2 is not UTF-8" in message
    error_of(load_yaml, write(tmp_path, "a: 1".encode("utf-16")))
    assert load_yaml(write(tmp_path, "a: \u00e9".encode("utf-8-sig"))) == {"a": "\u00e9"}


def test_anchors_and_merges_are_read_as_yaml_defines_them(tmp_path):
    text = "base: &b {<<: &c {k: 1, l: 2}, k: 3}\nnext: {<<: [*b, *c], l: 4}\nsame: *b"
    data = load_yaml(write(tmp_path, text))
    assert data == yaml.safe_load(text)
    assert data["next"] == {"k": 3, "l": 4}


@pytest.mark.parametrize(
    "data, fragments",
    [
        ({1: 2}, ["1: keys must be text"]),
        ({"train": {None: 2}}, ["train.null: keys must be text"]),
        ({"extra": {1: 2}}, ["extra: expected a mapping", "{1: 2}"]),
        ([], ["expected a section with keys", "[]"]),
        (None, ["expected a section with keys", "null"]),
        ({"name": object()}, ["name: expected text"]),
        ({"train": {"steps": 10**5000}, "name": 1}, ["name: expected text"]),
    ],
)
def test_mistakes_in_python_data(data, fragments):
    message = error_of(build, Config, data, where="run.yaml")
    assert message.startswith("run.yaml: ")
    for fragment in fragments:
        assert fragment in message


def test_choices_and_literals_go_by_type_and_leave_null_alone():
    literal, choice = dataclass_with(Literal[1, 2]), dataclass_with(str | None, choices=("a", "b"))
    assert build(literal, {"x": 1}).x == 1
    assert error_of(build, literal, {"x": True}) == "x: expected one of 1, 2, found true"
    assert build(choice, {"x": None}).x is None
    assert error_of(build, choice, {"x": "c"}) == "x: expected one of a, b or null, found 'c'"


def test_fields_that_are_computed_are_no_keys():
    @dataclasses.dataclass(frozen=True)
    class Computed:
        steps: int = 1
        twice: int = dataclasses.field(init=False, default=2)

    assert to_dict(Computed()) == {"steps": 1}
    assert [key for key, *_ in describe(Computed)] == ["steps"]
    assert "twice: unknown key" in error_of(build, Computed, {"twice": 3})


def test_a_required_key_is_asked_for():
    assert error_of(build, Adapter, {}) == "rank: required, and missing: set it to a whole number"


def test_the_nearest_key_of_a_section_comes_before_those_of_others():
    one, two = (dataclasses.make_dataclass("One", [(name, int, 0)]) for name in ("step", "steps"))
    tree = dataclasses.make_dataclass("Tree", [("first", one), ("second", two)])
    assert "did you mean second.steps?" in error_of(build, tree, {"second": {"stepp": 1}})
    assert "did you mean first.step?" in error_of(build, tree, {"first": {"steps": 1}})


# Overrides


@pytest.mark.parametrize(
    "text, path, value",
    [
        ("train.steps=10", ("train", "steps"), 10),
        ("a=1e-4", ("a",), 1e-4),
        ("a=-1E5", ("a",), -1e5),
        ("a= -.5 ", ("a",), -0.5),
        ("a='1e-4'", ("a",), "1e-4"),
        ('a="1e-4"', ("a",), "1e-4"),
        ("a=[1,2]", ("a",), [1, 2]),
        ("a={b: [c]}", ("a",), {"b": ["c"]}),
        ("a=null", ("a",), None),
        ("a=", ("a",), None),
        ("a=true", ("a",), True),
        ("a=off", ("a",), False),
        ("a='8'", ("a",), "8"),
        ("a=b=c", ("a",), "b=c"),
        ("a=b.c", ("a",), "b.c"),
        (" a . b = c d ", ("a", "b"), "c d"),
        ("a-b=/x/y.yaml", ("a-b",), "/x/y.yaml"),
    ],
)
def test_an_override_is_read_as_yaml(text, path, value):
    parsed = parse_override(text)
    assert parsed == (path, value)
    assert type(parsed[1]) is type(value)


@pytest.mark.parametrize(
    "text, fragments",
    [
        ("train.steps", ["'train.steps' is not an override", "section.key=value"]),
        ("", ["'' is not an override"]),
        ("=3", ["'=3' is not an override"]),
        ("a..b=3", ["'a..b=3' is not an override"]),
        (".a=3", ["'.a=3'"]),
        ("a.=3", ["'a.=3'"]),
        ("a=[1,2", ["command line: a: '[1,2' is not YAML (line 1, column", "quotes"]),
        ("a=@x", ["'@x' is not YAML", "cannot start any token", "quotes"]),
        ("a=b: c: d", ["'b: c: d' is not YAML"]),
        ("a=010", ["'010' is not YAML", "octal"]),
        ("a=12:30", ["'12:30' is not YAML", "base 60"]),
        ("a=x\n---\ny", ["is not YAML", "single document"]),
        ("a={b: 1, b: 2}", ["duplicate key 'b'"]),
    ],
)
def test_a_malformed_override(text, fragments):
    message = error_of(parse_override, text)
    assert message.startswith("command line: ")
    for fragment in fragments:
        assert fragment in message


def test_the_last_override_wins_over_earlier_ones_and_the_file(tmp_path):
    path = write(tmp_path, "train: {steps: 1, seed: 2}\noptimizer: null")
    config = load(Config, path, ["train.steps=3", "optimizer.clip=2", "train.steps=4"])
    assert config == Config(train=Train(steps=4, seed=2), optimizer=Optimizer(clip=2.0))


def test_an_override_of_a_section_replaces_it(tmp_path):
    path = write(tmp_path, "train: {steps: 1, seed: 2}\nadapter: {rank: 4}")
    config = load(Config, path, ["train={steps: 3}", "adapter=null"])
    assert config == Config(train=Train(steps=3))
    assert load(Config, path, ["adapter=null", "adapter.rank=2"]).adapter == Adapter(2)


def test_overrides_leave_the_data_alone_and_anchors_apart(tmp_path):
    data = load_yaml(write(tmp_path, "a: &x {k: 1}\nb: *x"))
    assert apply_overrides(data, [(("a", "k"), 2)]) == {"a": {"k": 2}, "b": {"k": 1}}
    assert data == {"a": {"k": 1}, "b": {"k": 1}}


@pytest.mark.parametrize(
    "override, start, fragments",
    [
        ("train.steps=x", "command line: train.steps:", ["a whole number", "'x'"]),
        ("train.step=3", "command line: train.step:", ["did you mean train.steps?"]),
        ("tran.steps=3", "command line: tran:", ["did you mean train?"]),
        ("train=3", "command line: train:", ["expected a section", "found 3"]),
        ("optimizer.clip=fast", "command line: optimizer.clip:", ["a number or null"]),
        ("optimizer.clip.x=1", "command line: optimizer.clip:", ["{'x': 1}"]),
        ("train.steps=0", "command line: train:", ["steps=0 must be at least 1"]),
        ("adapter.targets=[q]", "command line: adapter", ["adapter.rank: required"]),
        ("name.first=a", "command line: name.first:", ["name is 'b', which has no keys"]),
        ("ais.mask_high=1", "command line: ais:", ["mask_high=1.0 must be above mask_low=2.0"]),
    ],
)
def test_an_error_that_overrides_bring_names_the_command_line(tmp_path, override, start, fragments):
    path = write(tmp_path, "name: b\nais: {mask_low: 2}")
    message = error_of(load, Config, path, [override])
    assert message.startswith(start)
    for fragment in fragments:
        assert fragment in message


def test_an_error_of_the_file_names_the_file_whatever_is_overridden(tmp_path):
    path = write(tmp_path, "train: {seed: x, steps: y}")
    assert error_of(load, Config, path, ["name=a"]).startswith(f"{path}: train.steps: ")
    message = error_of(load, Config, path, ["train.steps=1"])
    assert message.startswith(f"{path} and command line: train.seed: ")


# Back to YAML


TEXT = st.text(max_size=12)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | FINITE | TEXT | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
CONFIGS = st.builds(
    Config,
    name=TEXT,
    train=st.builds(
        Train,
        steps=st.integers(1),
        seed=st.none() | st.integers(),
        remat=st.booleans(),
        mode=st.sampled_from(["off", "int8"]),
        layers=st.none() | st.lists(st.integers(), max_size=3).map(tuple),
        scale=FINITE | st.sampled_from(["auto", "no", "12:30", "010", "=", "<<", "null", "0x1"]),
        size=st.integers() | st.just("full"),
    ),
    optimizer=st.builds(
        Optimizer, learning_rate=FINITE, betas=st.lists(FINITE, max_size=3).map(tuple)
    ),
    adapter=st.none() | st.builds(Adapter, rank=st.integers(), targets=st.just(("q",))),
    ais=st.builds(AISConfig, severity_scale=st.just("auto") | st.floats(1e-30, 1e30)),
    extra=st.dictionaries(TEXT, PLAIN, max_size=3),
)
FILES = hypothesis_settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FILES
@given(CONFIGS)
def test_a_saved_config_loads_as_the_same_config(tmp_path, config):
    path = tmp_path / "saved.yaml"
    save_yaml(config, path)
    assert load(Config, path) == config
    assert build(Config, to_dict(config)) == config


def test_to_dict_holds_nothing_but_yaml():
    data = to_dict(Config(adapter=Adapter(2)))
    assert data["adapter"] == {"rank": 2, "targets": ["q", "v"]}
    assert data["optimizer"]["schedule"] == {"warmup": 10, "shape": "cosine"}
    assert list(data) == ["name", "train", "optimizer", "adapter", "ais", "extra"]


def test_a_saved_file_keeps_the_order_of_the_fields(tmp_path):
    save_yaml(Config(), tmp_path / "saved.yaml")
    keys = re.findall(r"^(\w+):", (tmp_path / "saved.yaml").read_text(), re.MULTILINE)
    assert keys == ["name", "train", "optimizer", "adapter", "ais", "extra"]


def test_saving_where_nothing_can_be_written(tmp_path):
    message = error_of(save_yaml, Config(), tmp_path / "none" / "run.yaml")
    assert f"{tmp_path}/none/run.yaml: cannot be written" in message
    assert "Is a directory" in error_of(save_yaml, Config(), tmp_path)


def test_replace_goes_by_dotted_keys_and_leaves_the_original():
    config = Config(train=Train(seed=5))
    changed = replace(config, {"train.steps": 7, "optimizer.betas": (0.5,), "adapter.rank": 3})
    assert changed == Config(
        train=Train(steps=7, seed=5), optimizer=Optimizer(betas=(0.5,)), adapter=Adapter(3)
    )
    assert config == Config(train=Train(seed=5))
    assert replace(config, {"train": Train(steps=2)}) == Config(train=Train(steps=2))
    assert replace(config, {}) == config


@pytest.mark.parametrize(
    "key, value, fragment",
    [
        ("train.step", 1, "train.step: unknown key; did you mean train.steps?"),
        ("train.steps", "7", "train.steps: expected a whole number, found '7'"),
        ("train.steps", 0, "train: steps=0 must be at least 1"),
        ("name.x", 0, "name.x: name is 'run', which has no keys"),
        ("", 0, "'': unknown key"),
    ],
)
def test_replace_checks(key, value, fragment):
    assert error_of(replace, Config(), {key: value}).startswith(fragment)


# Help


@pytest.mark.smoke
def test_describe_lists_every_key_in_order():
    lines = [line for line in describe(Config) if not line[0].startswith("ais.")]
    assert lines == [
        ("name", "text", '"run"', "of the run"),
        ("train.steps", "a whole number", "100", "updates"),
        ("train.seed", "a whole number or null", "null", "null draws one"),
        ("train.remat", "true or false", "false", "recompute"),
        ("train.mode", "one of off, int8, fp8", '"off"', "quantization"),
        ("train.layers", "a list (each a whole number) or null", "null", "null is all"),
        ("train.scale", "a number or text", '"auto"', "a number, or auto"),
        ("train.size", "a whole number or one of full", '"full"', "rows"),
        ("optimizer.learning_rate", "a number", "1e-06", "peak"),
        ("optimizer.betas", "a list (each a number)", "[0.9, 0.95]", "Adam's"),
        ("optimizer.clip", "a number or null", "1.0", "null is off"),
        ("optimizer.schedule.warmup", "a whole number", "10", "steps"),
        ("optimizer.schedule.shape", "one of cosine, linear", '"cosine"', "decay"),
        ("adapter", "a section or null", "null", "null trains every weight"),
        ("adapter.rank", "a whole number", "required", "rank"),
        ("adapter.targets", "a list (each one of q, k, v)", '["q", "v"]', "projections"),
        ("extra", "a mapping", "{}", "passed through"),
    ]


def test_fields_that_only_carry_metadata_are_described():
    lines = {key: rest for key, *rest in describe(AISConfig, "ais")}
    assert list(lines) == [f"ais.{field.name}" for field in dataclasses.fields(AISConfig)]
    assert lines["ais.cap"][:2] == ["a number or null", "2.0"]
    assert lines["ais.coefficient"][0] == "one of gated, shrinkage, fixed or null"
    assert lines["ais.coefficient"][1] == "null"
    assert all(doc for _, _, doc in lines.values())


def test_a_described_default_can_be_given_as_an_override():
    for key, _, default, _ in describe(Config):
        if default != "required" and not key.startswith("adapter."):
            override = parse_override(f"{key}={default}")
            assert build(Config, apply_overrides({}, [override])) == Config(), key


# Classes that YAML cannot express


@pytest.mark.parametrize(
    "annotation", [list, list[int], tuple[int, int], dict[str, int], set, int | list[int], Any]
)
def test_an_unsupported_type_is_a_programming_error(annotation):
    for function in (describe, lambda cls: build(cls, {"x": 1})):
        with pytest.raises(TypeError, match="a setting cannot be of type"):
            function(dataclass_with(annotation))


def test_a_section_of_two_classes_is_a_programming_error():
    with pytest.raises(TypeError, match=r"Sample\.x: a section is of one class"):
        describe(dataclass_with(Train | Optimizer))


@pytest.mark.parametrize("annotation", [Train, Train | None])
def test_a_section_default_other_than_its_class_gives_is_a_programming_error(annotation):
    with pytest.raises(TypeError, match=r"Sample\.x: the default must equal Train\(\)"):
        build(dataclass_with(annotation, default=Train(steps=3)), {})
    assert build(dataclass_with(annotation, default=Train()), {}).x == Train()


# Nothing but UserError

NAMES = st.sampled_from(
    [f.name for c in (Config, Train, Optimizer, Schedule, Adapter) for f in dataclasses.fields(c)]
)
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, math.nan, math.inf, "1e-4", "1e999", "auto", "off"])
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=3)
    | st.datetimes(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(NAMES, inner, max_size=4)
        | st.dictionaries(st.text(max_size=5) | st.integers() | st.none(), inner, max_size=2)
    ),
    max_leaves=12,
)


def only_user_errors(function, *args):
    """The result, or None where a one-line UserError was raised."""
    try:
        return function(*args)
    except UserError as error:
        message = str(error)
        assert message and len(message.splitlines()) == 1, message
        message.encode()


@FILES
@given(st.dictionaries(NAMES, ANYTHING, max_size=3) | ANYTHING)
def test_building_from_anything_gives_a_config_or_a_user_error(data):
    config = only_user_errors(build, Config, data)
    if config is not None:
        assert build(Config, to_dict(config)) == config


@FILES
@given(st.dictionaries(NAMES, ANYTHING, max_size=3) | ANYTHING)
def test_loading_anything_that_yaml_can_write(tmp_path, data):
    text = yaml.safe_dump(data)
    config = only_user_errors(load, Config, write(tmp_path, text))
    if config is not None:
        assert build(Config, yaml.safe_load(text)) == config


YAML_TOKENS = re.findall(
    r"\S+",
    """train steps 1 0x 010 1:2 2024-01-01 = << ? - : , [ ] { } &a *a | > ' " # --- ... %YAML
    !!set !!omap !!binary !!float !x @ ` ~ \\""",
)
SEPARATORS = ["", " ", ": ", "\n", "\n  ", "\t", "\0", "\ud800", "\x85"]
YAML_LIKE = st.lists(st.sampled_from(YAML_TOKENS + SEPARATORS * 3), max_size=20).map("".join)


@FILES
@given(YAML_LIKE.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=30))
def test_loading_any_bytes(tmp_path, content):
    only_user_errors(load, Config, write(tmp_path, content))


@FILES
@given(st.tuples(st.sampled_from(["", "train.", "a..", "extra."]), NAMES, YAML_LIKE | st.text()))
def test_any_override(tmp_path, parts):
    section, name, value = parts
    path = write(tmp_path, "{}")
    only_user_errors(load, Config, path, [f"{section}{name}={value}"])
    only_user_errors(load, Config, path, [section + value])
