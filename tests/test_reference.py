"""Promotion of a finished run, on a planted one in a folder that looks like the repository."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from safetensors.numpy import save_file

from kelib import plots, reference, results
from kelib.config import load_profile
from kelib.errors import KelibError
from kelib.readme import (
    claims_markdown,
    contact_markdown,
    controls_markdown,
    protocol_markdown,
    refresh_readme,
)
from kelib.readme_faults import faults_markdown
from kelib.readme_figures import figures_markdown
from kelib.reference import SEARCH, promote, shown_profile
from kelib.results import open_tables, save_figure, save_table
from kelib.tables import provenance, write_table

SECONDS = {"pretraining": 600, "entropy": 240, "continual": 1200, "interventions": 120}
RATE, LOWER = 6e-3, 1e-3
# what the claims need beside the numbers that are quoted
KNOWN = {"chance": 0.25, "k_pt": -6.0, "p_pt": 0.9, "p_cl": 0.5, "stage_label": "a stage"}
KNOWN_AFTER = {
    "chance": 0.25,
    "k_pt": -6.0,
    "p_pt": 0.9,
    "injected": True,
    "stage_label": "last",
    "k_modified": -6.0,
    "p_modified": 0.9,
}
CL_SEEDS, RATIOS = [0, 1, 0, 1, 0, 0, 0], [np.nan, np.nan, 0.5, 0.5, 0.5, np.nan, 0.5]
ARMS = ["none", "none", *["resuscitate"] * 3, "none", "resuscitate"]
DRAWN = ("fig02_knowledge_entropy", "fig04_stages", "fig05_resuscitation", "tab00_claims")
README = """Before.
<!-- generated: claims -->
old claims
<!-- end of claims -->
Between.
<!-- generated: controls -->
<!-- end of controls -->
<!-- generated: protocol -->
<!-- end of protocol -->
<!-- generated: figures -->
<!-- end of figures -->
After.
"""
NOTEBOOK = "import csv\nprint([r['step'] for r in csv.DictReader(open('../data/reference/{}'))])"


def planted() -> dict[str, pd.DataFrame]:
    """Measurement tables of one seed, small enough to do the sums by hand."""
    # sums of two layers: 6 at the start, collapse to 2, peak 5, end 4.5
    total = {0: 6.0, 100: 2.0, 500: 5.0, 1500: 4.5}
    entropy = [
        (100, step, layer, nats / 2, 4.0) for step, nats in total.items() for layer in (0, 1)
    ]
    continual = [
        (RATE, 500, 0, True, 0.20, 0.04, -4.0),
        (RATE, 500, 1, True, 0.30, 0.06, -4.2),
        (RATE, 1500, 0, True, 0.10, 0.20, -5.0),
        (RATE, 1500, 1, True, 0.20, 0.40, -5.2),
        # without injection and at another rate: quoted in the control only
        (RATE, 500, 0, False, 0.90, 0.90, -7.1),
        (RATE, 1500, 0, False, 0.90, 0.90, -8.6),
        (LOWER, 500, 0, True, 0.80, 0.80, -4.0),
        (LOWER, 500, 0, False, 0.80, 0.80, -4.5),
        (LOWER, 1500, 0, True, 0.80, 0.80, -4.0),
        (LOWER, 1500, 0, False, 0.80, 0.80, -4.25),
    ]
    interventions = [
        (RATE, np.nan, -3.0, 0.40),
        (RATE, np.nan, -3.2, 0.42),
        (RATE, 1.0, -2.9, 0.43),
        (RATE, 1.0, -3.0, 0.43),
        (RATE, 2.0, -9.0, 0.25),
        (LOWER, np.nan, -1.0, 0.99),
        (LOWER, 1.0, -8.0, 0.26),
    ]
    columns = ["learning_rate", "stage_step", "cl_seed", "injected", "acquisition"]
    columns += ["forgetting_over_chance", "k_cl"]
    return {
        "pretraining": pd.DataFrame({"seed": 100, "step": [25, 50], "loss": [6.0, 5.0]}),
        "entropies": pd.DataFrame({"seed": [100]}),
        "entropy": pd.DataFrame(
            entropy, columns=["seed", "step", "layer", "entropy_nats", "bound_nats"]
        ),
        "checkpoints": pd.DataFrame(
            {"seed": 100, "step": list(total), "p": 0.5, "tokens_per_parameter": 10.0}
        ),
        "continual": pd.DataFrame(continual, columns=columns).assign(seed=100, **KNOWN),
        "interventions": pd.DataFrame(
            interventions, columns=["learning_rate", "factor", "k_cl", "p_cl"]
        ).assign(
            seed=100,
            cl_seed=CL_SEEDS,
            ratio=RATIOS,
            intervention=ARMS,
            stage_step=1500,
            **KNOWN_AFTER,
        ),
    }


def claims() -> pd.DataFrame:
    """A claims table: an interval, none, no value at all, and one that is not primary."""
    rows = [
        (
            "K falls.",
            RATE,
            5,
            -0.12345,
            -0.2,
            -0.05,
            "nats",
            True,
            "reproduced",
            "25 to 19 %",
            "p",
        ),
        (
            "K falls.",
            LOWER,
            1,
            0.02,
            np.nan,
            np.nan,
            "nats",
            True,
            "indicative",
            "25 to 19 %",
            "n",
        ),
        (
            "F rises.",
            RATE,
            1,
            np.nan,
            np.nan,
            np.nan,
            "fraction",
            True,
            "not testable here",
            "up",
            "why",
        ),
        ("A falls.", RATE, 5, -0.5, -0.6, -0.4, "fraction", False, "exploratory", "down", ""),
    ]
    names = "statement learning_rate n mean low95 high95 unit primary verdict paper_value reason"
    return pd.DataFrame(rows, columns=names.split())


def measure(root: Path, name: str, parameters: dict[str, Any], tables: Any) -> Path:
    folder = root / "data" / "measurements" / name
    for table in tables:
        note = provenance(parameters, [100], {}) | {"run_seconds": SECONDS.get(table, 240)}
        note["runs"] = 10
        write_table(planted()[table], folder / f"{table}.csv", note)
    return folder


def notebook(path: Path, source: str, profile: str = "") -> None:
    cells = [nbformat.v4.new_code_cell(source)]
    if profile:
        tagged = {"tags": ["parameters"]}
        cells.insert(0, nbformat.v4.new_code_cell(f'profile = "{profile}"', metadata=tagged))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


def printed(path: Path) -> str:
    cell = nbformat.read(path, as_version=4).cells[-1]
    return "".join(output.text for output in cell.outputs)


@pytest.fixture
def root(tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of its own in which ``make figures PROFILE=small`` has just ended."""
    checkout = tmp_path / "checkout"
    shutil.copytree(finished, checkout)
    for module in (reference, results):
        monkeypatch.setattr(module, "repository_root", lambda: checkout)
    return checkout


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``root`` is a copy of."""
    root = tmp_path_factory.mktemp("finished")
    changes = {"seeds": [100], "workers": 1, "continual.learning_rates": [RATE, LOWER]}
    changes |= {"interventions.learning_rates": [RATE, LOWER]}
    folder = measure(root, "small", dataclasses.asdict(load_profile("small", changes)), planted())
    save_file({"0000000/00": np.ones(3)}, folder / "coefficients-seed100.safetensors")
    (folder / "runs").mkdir()  # what single runs left stays behind
    plt.switch_backend("agg")
    with mpl.rc_context(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "repository_root", lambda: root)
        tables = open_tables("small", "measurements")
        for name, table in (
            ("fig02_knowledge_entropy", "entropy"),
            ("fig04_stages", "continual"),
            ("fig05_resuscitation", "interventions"),
        ):
            save_figure(plots.panels(1)[0], name, planted()[table], tables, [table])
        save_figure(plots.panels(1)[0], "tab00_claims", claims(), tables, ["continual"])
        save_table("tab00_claims", claims(), tables, ["continual", "interventions"])
    plt.close("all")
    (tables.output / "fig02_knowledge_entropy.ipynb").write_text("executed copies are not promoted")
    (tables.output / "fig02_knowledge_entropy.failed.ipynb").write_text("nor are failed ones")
    (root / "README.md").write_text(README, encoding="utf-8")
    return root


def shown(tables: Any) -> Callable[[str], Any]:
    return {name: tables for name in DRAWN}.get


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- promotion ------------------------------------------------------------------------------------


def test_promotion(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = root / "notebooks"
    here, other = folder / "fig02_knowledge_entropy.ipynb", folder / "ours_search.ipynb"
    notebook(here, NOTEBOOK.format("small/pretraining.csv"), "small")
    notebook(other, NOTEBOOK.format("search/entropy.csv"))  # there is no such reference yet
    notebook(root / "notebooks" / "tab00_claims.ipynb", "1", "small")
    untouched = other.read_bytes()
    stale = root / "figures" / "reference" / "small" / "fig99.pdf"
    stale.parent.mkdir(parents=True)
    stale.write_text("of an earlier promotion")
    promote("small")

    data, figures = root / "data" / "reference" / "small", root / "figures" / "reference" / "small"
    tables = [f"{table}.{suffix}" for table in planted() for suffix in ("csv", "json")]
    assert names(data) == sorted([*tables, "coefficients-seed100.safetensors"])
    suffixes = ("csv", "json", "pdf", "png")
    drawn = [f"{name}.{suffix}" for name in DRAWN for suffix in suffixes]
    assert names(figures) == sorted(drawn)
    for made in (data, figures):
        source = root / ("data/measurements" if made == data else "figures") / "small"
        assert all(p.read_bytes() == (source / p.name).read_bytes() for p in made.iterdir())

    assert printed(here) == "['25', '50']\n"  # read from the promoted numbers
    content = nbformat.read(here, as_version=4)
    assert content.cells[0].execution_count == 1 and "execution" not in content.cells[0].metadata
    assert content.metadata["language_info"] == {"name": "python"}  # of no particular machine
    assert other.read_bytes() == untouched
    readme = (root / "README.md").read_text(encoding="utf-8")
    here_and_claims = (here.stem, "tab00_claims")  # there are no other notebooks
    of = {name: open_tables("small") for name in here_and_claims}
    for part in (claims_markdown(claims()), figures_markdown(of.get)):
        assert part in readme
    assert "old claims" not in readme
    assert [line for line in readme.splitlines() if line in ("Before.", "Between.", "After.")]
    assert "promoted small: 6 tables, 4 figures" in capsys.readouterr().out


def test_the_search_is_promoted_on_its_own(root: Path) -> None:
    """Its parameters are no profile, and neither README nor figure notebooks show it."""
    parameters = {"profile": SEARCH, "regimes": {"a/0": "abc"}}
    folder = measure(root, SEARCH, parameters, ("entropy", "checkpoints"))
    tables = open_tables(SEARCH, "measurements")
    assert tables.label == "profile search · pretraining seed 100"
    with pytest.raises(KelibError, match=r"missing key seeds"):
        _ = tables.profile
    with mpl.rc_context():
        save_figure(plots.panels(1)[0], "ours_search", planted()["entropy"], tables, ["entropy"])
    notebooks = root / "notebooks"
    here, other = notebooks / "ours_search.ipynb", notebooks / "fig02_knowledge_entropy.ipynb"
    notebook(here, NOTEBOOK.format("search/checkpoints.csv"))
    notebook(other, NOTEBOOK.format("small/pretraining.csv"), "small")
    promote(SEARCH)
    assert names(root / "data" / "reference" / SEARCH) == names(folder)
    assert len(names(root / "figures" / "reference" / SEARCH)) == 4
    assert printed(here) == "['0', '100', '500', '1500']\n" and printed(other) == ""
    assert (root / "README.md").read_text(encoding="utf-8") == README


def test_benchmarks_have_no_figures(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = root / "data" / "measurements" / "bench"
    write_table(pd.DataFrame({"ratio": [1.02]}), folder / "entropy.csv", provenance({}, [], {}))
    promote("bench")
    assert names(root / "data" / "reference" / "bench") == ["entropy.csv", "entropy.json"]
    assert "promoted bench: 1 tables" in capsys.readouterr().out


def replant(root: Path, table: str, profile: str = "small", step: int = 1) -> None:
    path = root / "data" / "measurements" / "small" / f"{table}.csv"
    parameters = json.loads(path.with_suffix(".json").read_text())["parameters"]
    changed = planted()[table].assign(step=step)
    write_table(changed, path, provenance(parameters | {"profile": profile}, [100], {}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda root: [p.unlink() for p in root.glob("data/measurements/small/continual.*")],
            r"no readable provenance .*continual.json; run its stage again",
        ),
        (
            lambda root: (root / "data/measurements/small/entropy.json").unlink(),
            r"no readable provenance .*entropy.json; run its stage again",
        ),
        (
            lambda root: (root / "data/measurements/small/interventions.csv").write_text("k\n1\n"),
            r"interventions.csv has sha256 \w+, its .json says \w+: it was changed after it was w",
        ),
        (
            lambda root: replant(root, "checkpoints", profile="smoke"),
            r"checkpoints.csv was made by profile smoke, not small; run it again",
        ),
        (
            lambda root: [path.unlink() for path in (root / "figures/small").iterdir()],
            r"no figures in .*small: run make figures PROFILE=small",
        ),
        (
            lambda root: (root / "figures/small/fig02_knowledge_entropy.pdf").unlink(),
            r"no fig02_\w+.pdf in .*small: delete fig02_\w+.json and run make figures PROFILE=",
        ),
        (
            lambda root: replant(root, "entropy"),
            r"fig02_\w+ was drawn from another entropy.csv: delete fig02_\w+.json and run make",
        ),
    ],
    ids=["table", "provenance", "changed", "profile", "figures", "pdf", "older"],
)
def test_what_is_not_finished_is_refused_before_anything_is_written(
    root: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(root)
    with pytest.raises(KelibError, match=message):
        promote("small")
    assert not (root / "data" / "reference").exists()
    assert not (root / "figures" / "reference").exists()
    assert (root / "README.md").read_text(encoding="utf-8") == README


def test_a_profile_that_never_ran_is_refused(root: Path) -> None:
    with pytest.raises(KelibError, match=r"nothing was measured in .*mine; there are small"):
        promote("mine")


# --- what the README quotes -----------------------------------------------------------------------


def test_the_primary_claims_in_markdown() -> None:
    assert claims_markdown(claims()).splitlines()[2:] == [
        "| K falls. | 0.006 | 5 | -0.123 nats | -0.200 … -0.050 | reproduced | 25 to 19 % |",
        "|  | 0.001 | 1 | +0.020 nats | none | indicative |  |",
        "| F rises. | 0.006 | 1 |  | none | not testable here (why) | up |",
    ]


def test_every_row_has_the_cells_of_its_header(root: Path) -> None:
    tables = open_tables("small", "measurements")
    for text in (claims_markdown(claims()), figures_markdown(shown(tables))):
        assert len({line.count("|") for line in text.splitlines()}) == 1


def test_the_figures_in_markdown(root: Path) -> None:
    tables = open_tables("small", "measurements")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in figures_markdown(shown(tables)).splitlines()[2:]
    ]
    assert [row[0] for row in rows] == ["2", "4", "5", "claims"]
    assert rows[0][1] == "[fig02_knowledge_entropy](notebooks/fig02_knowledge_entropy.ipynb)"
    assert rows[0][2] == "`figures/small/fig02_knowledge_entropy.json`"
    # seconds are summed over processes: with two workers, half of them pass on the clock
    workers = load_profile("small").workers
    assert [row[3] for row in rows] == [f"{m / workers:.0f}" for m in (18, 20, 2, 0)]
    assert rows[0][4] == "-0.50 nats after the peak, down in 1 of 1 seeds"
    assert rows[1][4] == "CL rate 0.006: A 25.0 → 15.0 %, F over chance 5.0 → 30.0 %"
    assert rows[2][4] == "CL rate 0.006: q = 1 minus original, K +0.150 nats, P +2.0 points"


def test_the_control_in_words(root: Path) -> None:
    text = controls_markdown(open_tables("small", "measurements"))
    assert "3.10 → 3.60 at 0.006, 0.50 → 0.25 at 0.001." in text


def test_the_protocol_in_markdown(root: Path) -> None:
    text = protocol_markdown(load_profile("small"))
    assert "| injected | 36 generated entries, every 12 steps, 4.7% of the sequences |" in text
    assert "| continual learning | 120 steps of 32 x 64 tokens |" in text


def test_faults_in_markdown(tmp_path: Path) -> None:
    note = provenance({}, [], {}) | {"machine": {"cores": 3, "processor": "Abacus"}}
    rows = [("fuzz", "a", 2000, 1999), ("fuzz", "b", 10, 10), ("kills", "kill one", 7, 7)]
    table = pd.DataFrame(rows, columns=["fault", "case", "tried", "survived"])
    write_table(table, tmp_path / "torture" / "faults.csv", note)
    changes = [("two threads", "loss", "pretraining", 1e-6), ("two threads", "k_cl", "end", 2e-5)]
    changes.append(("two threads", "steps", "end", 0.0))
    changed = pd.DataFrame(changes, columns=["case", "quantity", "table", "mean_of_range"])
    changed["changed"] = [4, 1, 0]
    write_table(changed, tmp_path / "torture" / "differences.csv", note)
    spread = [("known", "k", 0.1), ("continual", "p_cl", 1.4), ("known", "p", 0.3)]
    machines = pd.DataFrame(spread, columns=["table", "quantity", "spread"])
    row = {"statement": "One", "unit": "nats", "reference": "a, +1", "fresh": "b", "both": "c"}
    runs: dict[str, Any] = {"a": {"judgements": {"compared": 9, "changed": [row]}}}
    runs["a"]["processor_hours"] = 4.36
    write_table(
        machines, tmp_path / "machines" / "small.csv", note | {"parameters": {"runs": runs}}
    )
    text = faults_markdown(tmp_path)
    assert re.search(r"kills: .* \| 1 \| 7 \| 7 \|\n\| fuzz: .* \| 2 \| 2,010 \| 2,009 \|", text)
    assert "3 cores (Abacus)" in text
    assert "by at most 1.40 (continual, p_cl): in places as much as another seed" in text
    assert "Its runs took 4.4 hours of one core, 131 minutes of two." in text
    assert "1 of 9 verdicts and outcomes would be others:\n\n| | committed" in text
    assert "\n| One (nats) | a, +1 | b | c |" in text
    assert "two threads: 2 of 3 quantities, in the mean by at most 2.0e-05 of the range" in text


def test_first_contact_in_markdown(tmp_path: Path) -> None:
    steps = [("clone", 2.2, 30.0), ("environment", 90.0, 1900.0)]
    steps += [("first figure", 44.4, 3.0), ("all figures of smoke", 150.0, 9.0)]
    table = pd.DataFrame(steps, columns=["step", "seconds", "megabytes"])
    note = provenance({}, [], {}) | {"machine": {"cores": 3, "processor": "Abacus"}}
    write_table(table, tmp_path / "contact.csv", note)
    text = contact_markdown(tmp_path / "contact.csv")
    assert "3 cores (Abacus): 2 s for the clone (30 MB), 1.5 minutes for the environment" in text
    assert "(1.9 GB), 44 s more to the first figure of `smoke`, 2.5 minutes more to all" in text


def test_the_profile_that_a_notebook_shows(tmp_path: Path) -> None:
    notebook(tmp_path / "fig02.ipynb", "profile = 'other'", "small")
    assert shown_profile(tmp_path / "fig02.ipynb") == "small"
    notebook(tmp_path / "none.ipynb", "profile = 'other'")
    assert shown_profile(tmp_path / "none.ipynb") is None


def test_a_readme_without_its_markers_is_left_alone(root: Path) -> None:
    promote("small")
    readme = root / "README.md"
    readme.write_text(README.replace("generated: figures", "figures"), encoding="utf-8")
    before = readme.read_bytes()
    with pytest.raises(KelibError, match=r"no markers <!-- generated: figures --> .*found claims"):
        refresh_readme(readme, "small", {}.get)
    assert readme.read_bytes() == before
