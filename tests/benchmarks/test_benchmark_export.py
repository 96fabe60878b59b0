"""The record of exports: figures of tiny models, nothing of a checkpoint that is not installed."""

from __future__ import annotations

from hf_efficient.benchmarks import export


def test_a_record_has_every_export_and_the_way_back(monkeypatch):
    rows = [row for row in export.TINY if row[0] in ("BertForQuestionAnswering", "T5ForConditionalGeneration")]
    monkeypatch.setattr(export, "TINY", rows[:2] + rows[-1:])
    monkeypatch.setattr(export, "REAL", "no_such_package")
    document = export.export_suite(progress=False)
    assert [row["target"] for row in document["rows"]] == ["longformer"] * 4 + ["longt5"] * 4 + ["stock"] * 4
    assert "pip install" in document["settings"]["left out"]
    for row in document["rows"]:
        assert row["error"] <= 1e-4 and row["missing"] == row["unexpected"] == 0 and row["argmax_agreement"] == 1.0
        assert (row["import_error"] is None) == (row["target"] == "stock")
        assert row["unlike_original"] == (None if row["target"] == "stock" else 0)
    head, shown = export.export_rows(document)
    assert len(shown) == 12 and {len(row) for row in shown} == {len(head)}
