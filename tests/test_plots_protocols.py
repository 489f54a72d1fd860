"""Protocols come from the profile, their tables are means over seeds, and the paper's numbers agree
with each other.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from kelib import plots_learning, plots_protocols
from kelib.config import Continual, Optimizer, Variant
from kelib.errors import KelibError

HIGH, LOW = 0.006, 0.001
OPTIMIZER = Optimizer(weight_decay=0.1)


def plan(*variants: Variant) -> Continual:
    return Continual(
        steps=20,
        batch_size=16,
        learning_rates=(HIGH, LOW),
        seeds=(0,),
        stages=(0.5, 1.0),
        injections=10,
        optimizer=OPTIMIZER,
        variants=variants,
    )


BATCH = Variant("wide", (HIGH,), (0,), batch_size=32, steps=10)
EPOCHS = Variant("again", (HIGH, LOW), (0,), epochs=2, steps=40)
GENERAL = Variant("news", (HIGH,), (0,), text="general")


def runs(values: dict[tuple[str, float, int, int, int], float]) -> pd.DataFrame:
    """Keys are variant, rate, pretraining seed, stage and CL seed."""
    columns = ["variant", "learning_rate", "seed", "stage_step", "cl_seed"]
    table = pd.DataFrame([(*key, v) for key, v in values.items()], columns=[*columns, "k_cl"])
    return table.assign(injected=True)


# --- the paper ------------------------------------------------------------------------------------


def test_settings_of_the_paper_imply_the_same_models_before() -> None:
    table = plots_protocols.paper_table()
    stages = table.groupby("stage_step")[["k_pt", "p_pt"]]
    # every setting continues the same four checkpoints: only rounding may differ
    assert (stages.max() - stages.min()).max().to_dict() == pytest.approx(
        {"k_pt": 0, "p_pt": 0}, abs=1.5e-3
    )
    kinds = ["baseline", "rate x 2.5", "rate x 0.25", "batch", "epochs"]
    assert table["kind"].unique().tolist() == kinds and len(table) == 5 * 4
    assert table["stage_step"].max() == 738_000
    assert stages.mean()["p_pt"].is_monotonic_increasing


# --- which runs -----------------------------------------------------------------------------------


def test_protocols_are_named_by_how_they_depart_from_the_baseline() -> None:
    table = plots_protocols.protocols(plan(BATCH, EPOCHS, GENERAL))
    slow = "rate 0.001 (x 0.17)"
    names = ["baseline", slow, "batch 32 (x 2)", "2 epochs", f"2 epochs, {slow}"]
    assert table["protocol"].tolist() == names
    kinds = ["baseline", "rate x 0.17", "batch", "epochs", "epochs, rate x 0.17"]
    assert table["kind"].tolist() == kinds
    assert table["variant"].tolist() == ["protocol", "protocol", "wide", "again", "again"]
    assert table["sequences"].tolist() == [320, 320, 320, 640, 640]


@pytest.mark.parametrize(
    "change",
    [
        {"text": "general"},
        {"own_moments": True},
        {"stages": (0.1,)},
        {"optimizer": dataclasses.replace(OPTIMIZER, weight_decay=0.0)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_variants_that_change_more_are_no_rows(change: dict[str, object]) -> None:
    other = dataclasses.replace(BATCH, **change)
    assert len(plots_protocols.protocols(plan(other))) == 2


def test_a_run_that_only_stops_earlier_says_so() -> None:
    short = Variant("short", (HIGH,), (0,), steps=10)
    assert plots_protocols.protocols(plan(short))["protocol"].tolist()[-1] == ("baseline, 10 steps")


def test_the_variant_of_another_text_is_found_and_missed() -> None:
    both = dataclasses.replace(GENERAL, name="both", batch_size=32)
    assert plots_protocols.text_variant(plan(both, BATCH, GENERAL), "general") is GENERAL
    with pytest.raises(KelibError, match=r"text: general alone; there are .*wide.*add one to"):
        plots_protocols.text_variant(plan(BATCH), "general")


def test_runs_are_those_of_the_protocols_in_their_order() -> None:
    named = plots_protocols.protocols(plan(BATCH))
    variants = runs({("wide", HIGH, 100, 30, 0): -1, ("news", HIGH, 100, 30, 0): -2})
    continual = runs({("protocol", LOW, 100, 30, 0): -3, ("protocol", HIGH, 100, 30, 0): -4})
    control = continual.assign(injected=False)
    found = plots_protocols.protocol_runs([control, continual, variants], named)
    assert found["protocol"].tolist() == named["protocol"].tolist()
    assert found["kind"].tolist() == ["baseline", "rate x 0.17", "batch"]
    assert found["k_cl"].tolist() == [-4, -3, -1]
    assert found["seed"].dtype == int


def test_a_protocol_without_runs_is_named() -> None:
    named = plots_protocols.protocols(plan(BATCH))
    continual = runs({("protocol", rate, 100, 30, 0): -3 for rate in (LOW, HIGH)})
    with pytest.raises(KelibError, match=r"follows the protocol .*batch 32.*: run stage 3"):
        plots_protocols.protocol_runs([continual], named)


# --- tables and axes ------------------------------------------------------------------------------


def test_cells_are_means_over_seeds_with_half_an_interval() -> None:
    table = runs(
        {
            **{("b", HIGH, 100, 30, 0): 1.0, ("b", HIGH, 100, 30, 1): 2.0},
            **{("b", HIGH, 101, 30, 0): 2.5, ("b", HIGH, 101, 60, 0): -0.001},
            **{("a", HIGH, 100, 30, 0): np.nan, ("a", HIGH, 101, 30, 0): np.nan},
        }
    )
    table = table.rename(columns={"variant": "text"})  # a name that the function might use itself
    shown = plots_protocols.stages_table(table, "k_cl", "text", {30: "50%", 60: "100%"}, 10)
    # t(0.975, 1) = 12.706 times the standard error 0.5 of the seed means 1.5 and 2.5
    assert shown.to_dict("list") == {
        "text": ["b", "a"],
        "50%": ["20.0 ± 63.5", "–"],
        "100%": ["0.0", "–"],
    }


def test_one_seed_has_no_interval_however_many_cl_seeds() -> None:
    table = runs({("b", HIGH, 100, 30, seed): value for seed, value in enumerate((1.0, 2.0, 6.0))})
    shown = plots_protocols.stages_table(table, "k_cl", "variant", {30: "50%"}, decimals=2)
    assert shown["50%"].tolist() == ["3.00"]


def test_tables_by_title_have_headings_of_one_line() -> None:
    table = runs({("b", HIGH, 100, 30, 0): 0.5, ("b", HIGH, 100, 60, 0): 0.25})
    columns = {"k_cl": ("K", 1, 2), "p_cl": ("P (%)", 100, 1)}
    ticks = {30: "50%\n30", 60: "100%\n60"}
    found = plots_protocols.stages_tables(table.assign(p_cl=1), "variant", ticks, columns)
    assert found["K"].to_dict("records") == [{"variant": "b", "50% 30": "0.50", "100% 60": "0.25"}]
    assert list(found) == ["K", "P (%)"] and found["P (%)"]["50% 30"].tolist() == ["100.0"]


def test_what_lies_below_the_cut_is_named(ax: Axes) -> None:
    table = runs({("a", HIGH, 100, 30, 0): 5.0, ("a", HIGH, 100, 60, 0): -92.25})
    ticks = {30: "50%", 60: "100%"}
    plots_learning.against_stage(table, ax, "k_cl", "variant", {"a": "A"}, ticks, "A (%)")
    plots_protocols.cut_below(ax, -10)
    assert ax.get_ylim()[0] == -10 and ax.get_ylim()[1] > 5
    assert [text.get_text() for text in ax.texts] == ["-92.2 ↓"]


def test_the_note_says_what_intervals_are_and_when_they_are_cut() -> None:
    assert "no interval" in plots_protocols.lines_note(1)
    assert plots_protocols.lines_note(3).endswith("n = 3 pretraining seeds (cut at the axes).")
    assert plots_protocols.lines_note(5).endswith("95 % t interval over n = 5 pretraining seeds.")


def test_no_torch_is_imported() -> None:
    check = "import sys, kelib.plots_protocols; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=120)
