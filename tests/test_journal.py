import json

import pytest

from sartor.errors import UsageError
from sartor.journal import SCHEMA, Journal, read

KEY = {"model": "abc", "target": "onnxruntime"}


def test_records_survive_and_are_found(tmp_path):
    path = tmp_path / "run" / "journal.jsonl"
    with Journal(path, KEY) as journal:
        journal.append("measurement", plan="p1", ratio=0.5)
        journal.append("measurement", plan="p2", ratio=0.4)
        journal.append("decision", plan="p2")
    with Journal(path, KEY) as journal:
        assert [r["kind"] for r in journal.records] == ["measurement", "measurement", "decision"]
        found = journal.find("measurement", plan="p1")
        assert found is not None and found["ratio"] == 0.5
        assert journal.find("measurement", plan="p3") is None
        journal.append("decision", plan="p1")
    assert len(read(path)) == 4
    assert json.loads(path.read_text().splitlines()[0]) == {"schema": SCHEMA, "key": KEY}


@pytest.mark.parametrize("torn", [b"{", b'{"kind": "measurement", "ratio": 0.4}'])
def test_a_torn_last_line_is_dropped_and_the_next_record_is_whole(tmp_path, torn):
    path = tmp_path / "j.jsonl"
    with Journal(path, KEY) as journal:
        journal.append("measurement", ratio=0.5)
    with open(path, "ab") as stream:
        stream.write(torn)
    with Journal(path, KEY) as journal:
        assert len(journal.records) == 1
        journal.append("measurement", ratio=0.3)
    assert [r["ratio"] for r in read(path)] == [0.5, 0.3]


def test_a_torn_header_starts_again(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"schema": "sar')
    with Journal(path, KEY) as journal:
        journal.append("decision")
    assert len(read(path)) == 1


def test_damage_elsewhere_is_an_error(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path, KEY) as journal:
        journal.append("measurement", ratio=0.5)
        journal.append("measurement", ratio=0.6)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:-9] + b"\n" + lines[2])
    with pytest.raises(UsageError, match="Line 2"):
        Journal(path, KEY)
    path.write_text('{"schema": "other/1"}\n')
    with pytest.raises(UsageError, match="not a journal"):
        Journal(path, KEY)
    assert path.read_text() == '{"schema": "other/1"}\n', "a foreign file must not be touched"


def test_another_key_starts_afresh(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path, KEY) as journal:
        journal.append("measurement", ratio=0.5)
    with Journal(path, {**KEY, "target": "openvino"}) as journal:
        assert journal.records == ()
    assert read(path) == ()


def test_cleared_it_starts_afresh_under_its_key(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path, KEY) as journal:
        journal.append("measurement", ratio=0.5)
        journal.clear()
        assert journal.records == () and journal.find("measurement") is None
        journal.append("measurement", ratio=0.6)
    with Journal(path, KEY) as journal:
        assert [r["ratio"] for r in journal.records] == [0.6]


def test_two_writers_and_non_finite_numbers_are_refused(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path, KEY) as journal:
        with pytest.raises(UsageError, match="another process"):
            Journal(path, KEY)
        with pytest.raises(ValueError):
            journal.append("measurement", ratio=float("nan"))
    assert read(path) == ()
