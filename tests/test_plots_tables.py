"""Tables of means as text: rows in order, headings, and the summaries behind them."""

from __future__ import annotations

import pandas as pd

from kelib import plots, plots_tables

RUNS = pd.DataFrame(
    {
        "rate": [1, 1, 1, 1, 2, 2, 2, 2],
        "arm": ["b", "b", "a", "a"] * 2,
        "seed": [100, 101] * 4,
        "p": [0.5, 0.5, 0.25, 0.75, 0.0, 1.0, 1.0, 1.0],
    }
)


def test_rows_follow_the_orders_and_the_first_column_sorts_first() -> None:
    names = {"b": "B", "a": "A"}
    text, summaries = plots_tables.summary_table(
        RUNS, {"p": ("P (%)", 100)}, {"rate": [2, 1], "arm": names}
    )
    assert list(text) == ["rate", "arm", "P (%)"]
    assert text[["rate", "arm"]].to_numpy().tolist() == [[2, "B"], [2, "A"], [1, "B"], [1, "A"]]
    # 12.7 standard errors for two seeds; ties stand alone
    assert text["P (%)"].tolist() == ["50.00 ± 635.31", "100.00", "50.00", "50.00 ± 317.66"]
    own = plots.summarise(RUNS, "p", ["rate", "arm"])
    pd.testing.assert_frame_equal(summaries["p"], own)


def test_without_an_order_values_ascend() -> None:
    text, _ = plots_tables.summary_table(RUNS, {"p": ("P", 1)}, {"rate": None, "arm": ["b", "a"]})
    assert text["rate"].tolist() == [1, 1, 2, 2] and text["arm"].tolist() == ["b", "a"] * 2


def test_titles_stand_above_and_a_blank_line_behind() -> None:
    one = pd.DataFrame({"a": [1]})
    assert plots_tables.titled({"x": one, "y": one}) == "x\n a\n 1 \n\ny\n a\n 1 \n"
