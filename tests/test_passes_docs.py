"""docs/passes.md is generated; it must not drift from the passes."""

from __future__ import annotations

from pathlib import Path

from test_pipeline import Everything, Needy

from sartor.passes import docs
from sartor.passes.registry import pass_class
from sartor.strategies import docs as strategy_docs

DOCUMENT = Path(__file__).parents[1] / "docs" / "passes.md"


def test_no_drift():
    assert DOCUMENT.read_text(encoding="utf-8") == docs.markdown(docs.builtin_classes()), (
        "docs/passes.md differs from the passes; run: python -m sartor.passes.docs docs/passes.md"
    )


def test_no_drift_of_strategies():
    assert DOCUMENT.with_name("strategies.md").read_text(encoding="utf-8") == strategy_docs.markdown(), (
        "docs/strategies.md differs from the strategies; run: python -m sartor.strategies.docs docs/strategies.md"
    )


def test_every_option_and_semantics_is_told():
    text = docs.markdown([Everything, Needy])
    assert "| [`test-everything`](#test-everything) | exact | A pass with one option of every kind. |" in text
    assert "| `ratio-kept` | float ≥ -1e+06 and ≤ 1e+06 | `0.5` | A ratio. |" in text
    assert "| `scales` | [float, …] or none | `none` | Scales. |" in text
    assert "| `choice` | one of a, b | `a` | A choice. |" in text
    assert "| `high` | int | required | High. |" in text
    assert "## repeat" in text and "| `max` | int ≥ 1 and ≤ 1000 | required |" in text


def test_code_and_labels():
    text = docs.markdown([pass_class("fold-constants")])
    assert "**Becomes:**\n\n```\nt = Transpose(weight); y = MatMul(x, t)" in text
    assert "\n**Refuses when:** the result is larger than `max-bytes`" in text


def test_main_writes_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(docs, "builtin_classes", lambda: [Everything])
    assert docs.main([str(tmp_path / "passes.md")]) == 0
    assert (tmp_path / "passes.md").read_text(encoding="utf-8") == docs.markdown([Everything])
    assert docs.main([]) == 0 and capsys.readouterr().out == docs.markdown([Everything])
