"""Files of training problems: what is left out, what is refused, JSON lines and Parquet alike."""

import csv
import json
import logging
import re
import sys
import types

import pytest

from ais_jax.errors import UserError
from ais_jax.tasks import amc, arithmetic, countdown, gsm8k, math

EXPECTED = "expected .*question"


def rows(count):
    return [{"question": f"What is {i} plus 1?", "answer": f"#### {i + 1}"} for i in range(count)]


def write(path, good, bad):
    """A file of `good` rows with the lines `bad` at places that are returned."""
    lines = [json.dumps(row).encode() for row in rows(good)]
    places = []
    for i, line in enumerate(bad):
        lines.insert(10 * i, line)
        places.append(10 * i + 2)  # a blank line comes first
    path.write_bytes(b"\n".join([b"", *lines]))
    return places


BAD = [b"{", b'{"question": "?"}', b'{"question": "\xff", "answer": "#### 1"}']


def test_one_per_cent_of_malformed_lines_is_counted_and_left_out(tmp_path, caplog):
    path = tmp_path / "train.jsonl"
    places = write(path, 297, BAD)
    with caplog.at_level(logging.WARNING, "ais_jax"):
        options = gsm8k.Options(path=str(path))
        train = gsm8k.generate(200, 0, options=options)
        gsm8k.generate(20, 0, split="heldout", options=options)
    questions = {row["question"] for row in rows(297)}
    assert len(train) == 200 and {row["question"] for row in train} <= questions
    (record,) = caplog.records  # said once, though the file is read for both splits
    numbers = ", ".join(map(str, places))
    assert f"3 of 300 lines of {path} are malformed (line {numbers})" in record.message
    assert f"{path}, line 2: '{{'; expected" in record.message


def test_more_than_one_per_cent_stops_the_run(tmp_path):
    path = tmp_path / "train.jsonl"
    write(path, 296, [*BAD, b"[]"])
    with pytest.raises(UserError, match=r"4 of 300 lines .* \(line 2, 12, 22, 32\).* 1% is tol"):
        gsm8k.generate(200, 0, options=gsm8k.Options(path=str(path)))
    write(path, 0, [b"{"] * 7)
    with pytest.raises(UserError, match=r"7 of 7 lines .* \(line 2, 3, 4, 5, 6, \.\.\.\)"):
        gsm8k.generate(1, 0, options=gsm8k.Options(path=str(path)))


def test_evaluation_files_lose_nothing(tmp_path):
    """A missing problem would change what is measured."""
    path = tmp_path / "test.jsonl"
    write(path, 300, [BAD[2]])
    with pytest.raises(UserError, match=rf"line 2: not UTF-8 text; {EXPECTED}"):
        gsm8k.load(path)


def test_an_empty_file_is_told(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("\n")
    with pytest.raises(UserError, match=rf"train.jsonl, line 1: ''; {EXPECTED}"):
        gsm8k.generate(1, 0, options=gsm8k.Options(path=str(path)))


def test_parquet_holds_the_same_problems(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pip install ais-jax[parquet]")
    from pyarrow import parquet

    both = rows(300)
    table = pyarrow.Table.from_pylist([*both, {"question": None, "answer": "#### 1"}])
    parquet.write_table(table, tmp_path / "train.parquet", row_group_size=64)
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, both)))
    made = [
        gsm8k.generate(200, 3, options=gsm8k.Options(path=str(tmp_path / f"train.{kind}")))
        for kind in ("parquet", "jsonl")
    ]
    key = gsm8k.key
    assert {key(x) for x in made[0]} <= {key(x) for x in both} and len(made[0]) == 200
    assert len(made[1]) == 200
    with pytest.raises(UserError, match=rf"parquet, line 301: .*None.*; {EXPECTED}"):
        gsm8k.load(tmp_path / "train.parquet")
    with pytest.raises(UserError, match="301 of 301 lines"):
        math.generate(1, 0, options=math.Options(path=str(tmp_path / "train.parquet")))
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "train.parquet").read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"torn\.parquet: .*{EXPECTED}"):
        gsm8k.load(tmp_path / "torn.parquet")


def test_parquet_without_pyarrow_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / "train.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow; pip install 'ais-jax\[parquet\]'"):
        gsm8k.load(path)


def test_csv_holds_the_same_problems(tmp_path):
    path = tmp_path / "test.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["level", "question", "answer"])
        writer.writeheader()
        writer.writerows({"level": "01", **row} for row in rows(30))
        file.write('\r\n"Two\nlines, ""quoted""?",#### 1\r\n')
    with pytest.raises(UserError, match=rf"test\.csv, line 34: .*{EXPECTED}"):
        gsm8k.load(path)
    text = path.read_bytes().replace(b'\r\n"Two', b'\r\n1,"Two')
    path.write_bytes(text)
    assert gsm8k.load(path) == [
        *rows(30),
        {"question": 'Two\nlines, "quoted"?', "answer": "#### 1"},
    ]


def test_csv_fields_are_of_any_size(tmp_path):
    path = tmp_path / "test.csv"
    limit = csv.field_size_limit()
    path.write_text('question,answer\n"' + "x" * 200_000 + '",#### 1\n')
    assert gsm8k.load(path) == [{"question": "x" * 200_000, "answer": "#### 1"}]
    assert csv.field_size_limit() == limit


def test_malformed_csv(tmp_path):
    path = tmp_path / "test.csv"
    path.write_text("\n\r\nquestion,answer\r\n\nWhat?,#### 1\ra\x00,")  # a torn last row
    with pytest.raises(UserError, match=rf"test\.csv, line 6: .*{EXPECTED}"):
        gsm8k.load(path)
    path.write_text("answer,quest\n#### 1,What?\n")
    with pytest.raises(UserError, match=rf"line 2: .*'quest': 'What\?'.*{EXPECTED}"):
        gsm8k.load(path)


def test_every_task_reads_csv(tmp_path):
    path = tmp_path / "problems.csv"
    for task, text, example in (
        (countdown, 'input,output\n"30,100,93",23', {"numbers": [30, 100, 93], "target": 23}),
        (arithmetic, "problem,answer\n7*8,56", {"problem": "7*8", "answer": 56}),
        (math, "problem,answer\nHalf of 1?,0.5", {"problem": "Half of 1?", "answer": "0.5"}),
        (amc, "problem,answer\nHalf of 54?,27.0", {"problem": "Half of 54?", "answer": "27.0"}),
    ):
        path.write_text(text + "\n")
        assert task.load(path) == [example]


def test_countdown_takes_the_fields_of_the_hub(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"target": 23, "nums": [30, 100, 93]}\n')
    assert countdown.load(path) == [{"numbers": [30, 100, 93], "target": 23}]


@pytest.fixture
def hub(monkeypatch):
    """What a stand-in for the datasets library was asked for; it has one dataset."""
    asked = []

    def load_dataset(name, config, split):  # nor trust_remote_code
        asked.append((name, config, split))
        if name != "openai/gsm8k":
            raise ConnectionError("Couldn't reach the Hub\nafter 5 tries")
        return rows(3)

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_a_dataset_of_the_hub_is_read_as_a_file_is(hub):
    assert gsm8k.load("hf:openai/gsm8k:main:test") == rows(3)
    assert gsm8k.load("hf:openai/gsm8k:test") == rows(3)
    assert gsm8k.load("hf:openai/gsm8k:test[:3]") == rows(3)
    assert [asked[1:] for asked in hub] == [("main", "test"), (None, "test"), (None, "test[:3]")]
    options = gsm8k.Options(path="hf:openai/gsm8k:main:train")
    found = gsm8k.generate(2, 0, options=options)
    assert len(found) == 2 and all(example in rows(3) for example in found)


def test_a_dataset_that_cannot_be_read_is_one_line(hub, monkeypatch):
    with pytest.raises(
        UserError, match=r"hf:no/such:test cannot be read: Couldn't reach .*download a file"
    ):
        gsm8k.load("hf:no/such:test")
    for source in ["hf:", "hf:a", "hf:a:b:c:d", "hf::test", "hf:a:", "hf:a:test[", "hf:a:[:2]"]:
        with pytest.raises(
            UserError, match=rf"{re.escape(source)} is no dataset: write hf:NAME:SPLIT"
        ):
            gsm8k.load(source)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"hf:a:test needs datasets; pip install 'ais-jax\[hub\]'"):
        gsm8k.load("hf:a:test")
