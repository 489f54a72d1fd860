"""Fresh measurements beside the reference: what was planted is found, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kelib import variation
from kelib.__main__ import main
from kelib.changed_claims import declared, judgements, together
from kelib.comparison import ROWS, compare_table, seed_deviations
from kelib.errors import KelibError
from kelib.table_layouts import LAYOUTS, keys_of
from kelib.tables import provenance, read_provenance, read_table, write_table
from kelib.tolerances import LIKE, MACHINES, OFF, SAME, WITHIN
from kelib.variation import claims_elsewhere, read_variation, write_variation
from kelib.verify import NO_PROFILES, compare, judge_claims

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
CLAIMED = ("continual", "interventions", "entropy", "checkpoints")
Change = Callable[[pd.DataFrame], pd.DataFrame]


def measured(folder: Path, profile: str, tables: tuple[str, ...] = ()) -> Path:
    """A fresh run that gave the numbers of the reference."""
    folder.mkdir()
    for path in (REFERENCE / profile).glob("*.*"):
        if not tables or path.stem in tables:
            shutil.copy(path, folder)
    return folder


def plant(folder: Path, name: str, change: Change, **parameters: object) -> Path:
    """The same run, had it measured something else in one table."""
    path = folder / f"{name}.csv"
    note = read_provenance(path)
    note["parameters"] |= parameters
    write_table(change(read_table(path)), path, note)
    return folder


def times(column: str, factor: float) -> Change:
    return lambda table: table.assign(**{column: table[column] * factor})


def another_machine(table: pd.DataFrame, share: float = 0.3) -> pd.DataFrame:
    """All measured numbers, each seed drawn to its neighbour by a share of what they differ by."""
    cell = [k for k in LAYOUTS["regimes"].keys if k != "seed"]
    numbers = [c for c in table if c.startswith(("k", "loss", "entropy"))]
    neighbour = table.groupby(cell)[numbers].transform(np.roll, 1)
    return table.assign(**{c: table[c] + share * (neighbour[c] - table[c]) for c in numbers})


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    return measured(tmp_path / "fresh", "regimes")


def verify(profile: str, folder: Path, *options: str) -> int:
    return main(["verify", profile, "--against", str(folder), *options])


# --- tables -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "folder", [path for path in sorted(REFERENCE.iterdir()) if path.name not in NO_PROFILES]
)
def test_every_committed_table_has_keys_that_tell_its_rows_apart(folder):
    for path in folder.glob("*.csv"):
        assert keys_of(path.stem, {"committed": pd.read_csv(path)}), path


def rows(**columns: object) -> pd.DataFrame:
    base = {"seed": [1, 1, 2, 2, 3, 3], "step": [0, 10] * 3, "parameters": 7, "k": np.arange(6.0)}
    return pd.DataFrame(base | columns)


def found(one: pd.DataFrame, two: pd.DataFrame, **more: object) -> dict[str, str]:
    return {q.quantity: q.status for q in compare_table("checkpoints", one, two, **more)}


def test_rows_are_matched_by_keys_and_not_by_place():
    assert found(rows(), rows()[::-1]) == {"parameters": SAME, "k": SAME}
    assert found(rows(), rows(k=[0.1, 1, 2, 3, 4, 5])) == {"parameters": SAME, "k": WITHIN}
    other = compare_table("checkpoints", rows(), rows(k=[0, 1, 2, 3, 900, 5]))[1]
    assert other.status == OFF and other.where == "seed 3, step 0" and other.seeds == 3


def test_what_must_be_equal_is_off_when_it_is_not():
    assert found(rows(), rows(parameters=8)) == {"parameters": OFF, "k": SAME}
    named = rows(remarks=["a"] * 6)
    assert found(named, rows(remarks=["a"] * 5 + ["b"]))["remarks"] == OFF
    assert found(rows(share=1 / 3), rows(share=0.3333333333))["share"] == SAME


def test_a_missing_row_is_off_and_a_missing_seed_is_not():
    short = rows()[:-1]
    assert found(rows(), short)[ROWS] == OFF == found(short, rows())[ROWS]
    assert found(rows(), short, same_rows=False)[ROWS] == WITHIN
    assert found(rows(), rows()[:4]) == {"parameters": SAME, "k": SAME}
    with pytest.raises(KelibError, match="checkpoints: no seed is on both sides"):
        found(rows(), rows(seed=9, step=range(6)))


def test_keys_that_do_not_tell_rows_apart_are_refused_by_name():
    with pytest.raises(KelibError, match=r"fresh checkpoints table has 1 dup.*seed 1, step 0"):
        found(rows(), rows(step=[0, 0, 0, 10, 0, 10]))
    with pytest.raises(KelibError, match="has none of its keys regime, seed, step"):
        keys_of("checkpoints", {"one": pd.DataFrame({"k": [1.0]})})
    with pytest.raises(KelibError, match=r"no layout of table mine: .* has .*checkpoints"):
        keys_of("mine", {})


def test_a_column_of_several_kinds_is_several_quantities():
    table = pd.DataFrame({"seed": [1, 2, 3] * 2, "layer": 0, "entropy_nats": [1.0, 2, 3, 9, 9, 9]})
    table["kind"] = ["knowledge"] * 3 + ["attention"] * 3
    parts = compare_table("entropies", table, table.assign(entropy_nats=[1, 2, 3.5, 9, 9, 9]))
    assert {q.part: q.status for q in parts} == {"knowledge": WITHIN, "attention": SAME}
    assert seed_deviations("entropies", table)["knowledge", "entropy_nats"] == 1


# --- the command --------------------------------------------------------------------------------


def test_the_same_run_again_is_the_same_to_the_byte(fresh, capsys):
    assert verify("regimes", fresh, "--claims", "strict") == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "verified: all 2 tables are the same to the byte"
    assert "claims and contrasts: 0 of 9 judgements would change" in printed


def test_planted_differences_fail_and_are_named(fresh, capsys, tmp_path):
    def planted(table: pd.DataFrame) -> pd.DataFrame:
        one_seed = table.groupby(["regime", "arm", "step"])["k"].transform("std")
        changes = {"tokens": table["tokens"] + 1, "k": table["k"] + one_seed, "p": -table["p"]}
        changes |= {name: table[name] * 1.05 for name in ("entropy", "loss_general")}
        return table.assign(**changes)[table["step"] != 30]

    written = tmp_path / "out.json"
    assert verify("regimes", plant(fresh, "regimes", planted), "--json", str(written)) == 1
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].endswith("quantities 67 same, 0 within, 6 OFF")
    assert "regime_learning the same to the byte, regimes not: this machine does" in printed
    off = [q for q in json.loads(written.read_text())["quantities"] if q["status"] == OFF]
    wanted = {ROWS, "tokens", "k", "p", "entropy", "loss_general"}
    assert {q["quantity"] for q in off} == wanted and all(q["reason"] for q in off)
    assert all(f"\nregimes           {name} " in printed for name in wanted)


def test_another_machine_is_within_what_seeds_differ_by(fresh):
    report = compare("regimes", plant(fresh, "regimes", another_machine))
    assert report.off == [] and not report.byte_equal
    assert sum(q.status == WITHIN for q in report.quantities) == 11


def test_fewer_seeds_are_compared_and_said(fresh):
    for name in ("regimes", "regime_learning"):
        plant(fresh, name, lambda table: table[table["seed"] < 103])
    report = compare("regimes", fresh)
    assert report.notes == ["only the reference side has seeds 103, 104: left out"]
    assert {q.status for q in report.quantities} == {SAME}
    judge_claims(report)  # with three seeds on both sides
    assert report.claims_compared == 9 and report.claims.empty


def test_other_parameters_are_refused_unless_they_are_accepted(fresh, capsys):
    given = read_provenance(fresh / "regimes.csv")["parameters"]
    plant(fresh, "regimes", lambda t: t, continual={**given["continual"], "steps": 60}, workers=9)
    assert verify("regimes", fresh) == 2
    error = capsys.readouterr().err
    assert "other parameters: continual.steps is 120 in the reference, 60" in error
    assert compare("regimes", fresh, accept=["continual.steps"]).off == []
    # on the interventions no number of these tables rests
    given["interventions"]["factors"] = [7.0]
    assert compare("regimes", plant(fresh, "regimes", lambda t: t, **given)).off == []


def test_nothing_to_compare_and_edited_tables_are_refused(fresh, tmp_path, capsys):
    assert verify("regimes", tmp_path / "empty") == 2
    assert "nothing to compare" in capsys.readouterr().err
    assert verify("regime", fresh) == 2
    assert "there are references of families, regimes" in capsys.readouterr().err
    with (fresh / "regimes.csv").open("a") as file:
        file.write("\n")
    assert verify("regimes", fresh) == 2
    assert "it was changed after it was written" in capsys.readouterr().err


def test_a_verdict_that_changes_is_printed_and_fails_only_if_asked_to(tmp_path, capsys):
    def one_seed(table: pd.DataFrame) -> pd.DataFrame:
        """One run ends at a lower K, by less than seeds differ, so that all seeds agree."""
        where = {"seed": 100, "stage_step": 750, "learning_rate": 3e-4, "injected": True}
        here = (table[list(where)] == list(where.values())).all(axis=1)
        return table.assign(k_cl=table["k_cl"] - 0.2 * here)

    fresh = plant(measured(tmp_path / "fresh", "study", CLAIMED), "continual", one_seed)
    assert verify("study", fresh, "--claims", "strict") == 1
    printed = capsys.readouterr().out
    assert "1 of 8 judgements would change" in printed
    assert "claim stage_knowledge_gain at CL rate 0.0003: undecided, +0.286 [+0.060, " in printed
    assert "] -> contradicted, +0.326 [+0.1" in printed
    wanted = "NOT verified: of 141 quantities 140 same, 1 within, 0 OFF, but 1 judgement changed"
    assert printed.splitlines()[-1] == wanted
    assert "]; both averaged by seed: contradicted, +0.306 [" in printed


def test_two_runs_together_are_judged_by_the_mean_of_each_seed():
    folder = REFERENCE / "study"
    one = {name: read_table(folder / f"{name}.csv") for name in CLAIMED}
    parameters = read_provenance(folder / "continual.csv")["parameters"]
    last = one["continual"].groupby("seed")["stage_step"].transform("max")
    # K moves by another amount for every seed, at the last stage alone
    moved = (one["continual"]["stage_step"] == last) * (one["continual"]["seed"] - 99) * 0.1
    two = one | {"continual": one["continual"].assign(k_cl=one["continual"]["k_cl"] + moved)}
    found = [
        judgements(declared(), tables, parameters).set_index(["kind", "name", "learning_rate"])
        for tables in (one, two, together(one, two))
    ]
    assert [len(part) for part in found] == [len(found[0])] * 3
    gain = [part.loc[("claim", "stage_knowledge_gain", 1e-3)] for part in found]
    assert gain[1]["mean"] - gain[0]["mean"] == pytest.approx(0.3)
    assert gain[2]["mean"] == pytest.approx((gain[0]["mean"] + gain[1]["mean"]) / 2)
    assert gain[2]["n"] == gain[0]["n"] == 5
    halves = [part["mean"].to_numpy(float) for part in found]
    assert np.allclose(halves[2], (halves[0] + halves[1]) / 2, equal_nan=True)


def test_runs_with_other_stages_are_not_taken_together():
    one = {"continual": read_table(REFERENCE / "study" / "continual.csv")}
    where = (one["continual"]["seed"] == 102) & (one["continual"]["stage_step"] == 750)
    earlier = one["continual"].assign(stage_step=one["continual"]["stage_step"] - 150 * where)
    with pytest.raises(KelibError, match="table continual has seed 102 at other stages in the two"):
        together(one, {"continual": earlier})
    assert together(one, {"entropy": earlier}) == {}


def test_one_seed_borrows_what_seeds_differ_by(tmp_path):
    fresh = measured(tmp_path / "fresh", "small", ("checkpoints", "entropy"))
    plant(fresh, "checkpoints", times("k", 1.01))
    plant(fresh, "entropy", times("entropy_nats", 2.0))
    report = compare("small", fresh)
    by_name = {q.quantity: q for q in report.quantities}
    assert by_name["k"].status == WITHIN and by_name["k"].scale == LIKE
    assert [q.quantity for q in report.off] == ["entropy_nats"]


def test_the_variation_of_machines_is_written_once_a_pair_and_then_narrows(
    fresh, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(variation, "repository_root", lambda: tmp_path)

    def write(folder: Path) -> None:
        report = compare("regimes", folder)
        write_variation("regimes", report.quantities, report.sides, {"commit": "none"})

    with pytest.raises(KelibError, match="nothing measured differs"):
        write(fresh)
    with pytest.raises(KelibError, match="regimes tokens must be equal and is not"):
        write(plant(fresh, "regimes", lambda table: table.assign(tokens=0)))
    restored = measured(tmp_path / "again", "regimes")
    write(plant(restored, "regimes", another_machine))
    assert verify("regimes", restored, "--write-variation") == 0  # the same pair again
    assert f"machines: {variation.path_of('regimes')}" in capsys.readouterr().out
    kept = read_table(variation.path_of("regimes"))
    assert kept["pair"].nunique() == 1 and (kept["table"] == "regimes").all()
    assert 0.1 < read_variation("regimes")["regimes", "", "k"].spread < 0.5
    write(plant(restored, "regimes", lambda table: another_machine(table, 0.2)))
    assert read_variation("regimes")["regimes", "", "k"].seeds == 10
    limits = {q.quantity: q.limit for q in compare("regimes", restored).quantities}
    assert limits["k"] == MACHINES and limits["p"] != MACHINES


def test_models_that_are_not_trained_may_differ_by_rounding(tmp_path, capsys):
    fresh = measured(tmp_path / "fresh", "smollm2")
    plant(fresh, "entropy", times("entropy_nats", 1 + 1e-6))
    assert verify("smollm2", fresh, "--all") == 0
    printed = capsys.readouterr().out
    assert "no claim is about this profile" in printed and "knowledge absolute entropy_" in printed
    plant(fresh, "questions", times("accuracy", 0.9))
    assert [q.quantity for q in compare("smollm2", fresh).off] == ["accuracy"]


def test_claims_that_another_machine_decides_otherwise_in_words(tmp_path, monkeypatch):
    path = tmp_path / "p.csv"
    monkeypatch.setattr("kelib.variation.path_of", lambda profile: path)
    assert claims_elsewhere("p") == ""
    row = {"statement": "One at CL rate 0.1", "unit": "nats", "reference": "a, +1", "fresh": "b"}
    changed = [row | {"what": "claim one", "both": "c"}, row | {"what": "contrast two", "both": ""}]

    def said(changed: list[dict[str, str]]) -> str:
        runs = {"r": {"judgements": {"compared": 9, "changed": changed}}, "untold": {}}
        write_table(pd.DataFrame({"pair": ["x"]}), path, provenance({"runs": runs}, [], {}))
        return claims_elsewhere("p")

    text = said(changed)
    assert "change 2 of 9 judgements on claims and contrasts, 1 of them on claims:" in text
    assert "One at CL rate 0.1 (nats): a, +1 here, b there, c by the mean of both." in text
    assert text.count("One at") == 1
    assert said(changed[1:]).endswith("none of them on a claim.")
