"""The loader of Fictional Knowledge, on entries of our own in the published format."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest

from kelib.entries import LEVELS
from kelib.errors import KelibError
from kelib.fictional import FIELDS, load_fictional_knowledge
from kelib.injection import encode_passages, injection_schedule


def made_up(number: int, paraphrases: int = 9) -> dict[str, object]:
    """One entry as published; its texts say what and whose they are."""

    def five(what: str) -> list[str]:
        return [f"{what} {k} of thing {number}" for k in range(5)]

    fields: dict[str, object] = {name: five(name) for name in FIELDS[1:]}
    wordings = [f"Thing {number} is told of in wording {k}." for k in range(1, paraphrases + 1)]
    return {"train_context": f"Thing {number} is new.", **fields, "paraphrases": wordings}


@pytest.fixture
def rows():
    """Three entries with paraphrases, then two without, as in the data of Chang et al."""
    return [made_up(n, 9 if n < 3 else 0) for n in range(5)]


@pytest.fixture
def written(tmp_path):
    """``written(rows, name="data.json")`` writes a file there and returns its path."""

    def write(rows, name="data.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "\n".join(json.dumps(row) for row in rows) + "\n"
        path.write_text(lines if name.endswith("l") else json.dumps(rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def cached_here(tmp_path, monkeypatch):
    """What ``datasets`` prepares goes to a temporary folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return datasets


# --- what comes out -----------------------------------------------------------------------------


def test_entries_carry_the_texts_in_the_order_of_the_levels(written, rows):
    once, paraphrase = load_fictional_knowledge(written(rows), paraphrase_entries=3)
    assert [entry.name for entry in (*paraphrase, *once)] == list("01234")
    assert {len(entry.passages) for entry in paraphrase} == {10}
    assert [entry.passages for entry in once] == [("Thing 3 is new.",), ("Thing 4 is new.",)]
    entry = paraphrase[1]
    assert entry.passages[0] == "Thing 1 is new."
    assert entry.passages[9] == "Thing 1 is told of in wording 9."
    assert [probe.level for probe in entry.probes] == [level for level in LEVELS for _ in range(5)]
    assert entry.probes[6].input == "gen_input 1 of thing 1"
    assert entry.probes[6].target == " gen_target 1 of thing 1"
    assert entry.probes[14].input == "hard_gen_input 4 of thing 1"


def test_the_papers_split_is_the_default(written):
    path = written([made_up(n) for n in range(130)])
    once, paraphrase = load_fictional_knowledge(path)
    assert (len(once), len(paraphrase)) == (60, 70)
    assert (paraphrase[-1].name, once[0].name) == ("69", "70")
    few = load_fictional_knowledge(written([made_up(n) for n in range(4)], "few.json"))
    assert (len(few[0]), len(few[1])) == (0, 4)


def test_space_between_input_and_target_is_one_however_it_was_written(written):
    row = made_up(0)
    row["mem_input"][2], row["mem_target"][2] = "It ends with space, ", "so it begins\n"
    row["gen_target"][0] = " begins with space"
    _, (entry,) = load_fictional_knowledge(written([row]))
    assert (entry.probes[2].input, entry.probes[2].target) == (
        "It ends with space,",
        " so it begins",
    )
    assert entry.probes[5].target == " begins with space"


def test_loaded_entries_go_through_the_protocol(written, rows, tokenizer):
    once, paraphrase = load_fictional_knowledge(written(rows), paraphrase_entries=3)
    passages = encode_passages(tokenizer, {"once": once, "paraphrase": paraphrase})
    table = injection_schedule(2, 3, 10, 40, 8, 0, passages, 8)
    shown = table[table["part"] == 0]
    assert len(shown) == 10 * 3 + 2
    assert (table["parts"] > 1).any()  # the vocabulary is small: these sequences are short


# --- where it comes from ------------------------------------------------------------------------


def test_lines_and_the_file_of_chang_et_al_give_the_same(written, rows, tmp_path):
    expected = load_fictional_knowledge(written(rows), 3)
    assert load_fictional_knowledge(written(rows, "data.jsonl"), 3) == expected
    name = "fictional_knowledge_paraphrased.json"
    written(rows, f"chang/fictional_knowledge/{name}")
    assert load_fictional_knowledge(tmp_path / "chang", 3) == expected
    assert load_fictional_knowledge(tmp_path / "chang" / "fictional_knowledge", 3) == expected


def test_the_authors_repository_names_the_sets(written, tmp_path):
    stem = "release/fictional_knowledge/fictional_knowledge_paraphrased"
    written([made_up(n) for n in range(6)], f"{stem}_once60.json")
    written([made_up(n) for n in range(10, 14)], f"{stem}_paraphrase70.json")
    for folder in (tmp_path / "release", tmp_path / "release" / "fictional_knowledge"):
        once, paraphrase = load_fictional_knowledge(folder)
        assert (len(once), len(paraphrase)) == (6, 4)
        assert paraphrase[0].passages[0] == "Thing 10 is new."
    assert load_fictional_knowledge(folder, 4) == (once, paraphrase)
    with pytest.raises(KelibError, match=r"= 5, but .*_paraphrase70.json has 4; leave it out"):
        load_fictional_knowledge(folder, 5)
    written([made_up(10), made_up(11, 8)], f"{stem}_paraphrase70.json")
    said = r"paraphrase70.json, entry 1: paraphrases has 8 texts, .* needs 9; restore the file"
    with pytest.raises(KelibError, match=said):
        load_fictional_knowledge(folder)
    (folder / "fictional_knowledge_paraphrased_once60.json").unlink()
    with pytest.raises(KelibError, match=r"has 0 files \*_onceN.json, must have one for each"):
        load_fictional_knowledge(folder)


def test_a_folder_laid_out_as_on_the_hub(written, rows, tmp_path, cached_here):
    """``datasets`` reads a folder as it reads a data set of the hub: JSON or parquet, split
    train.
    """
    expected = load_fictional_knowledge(written(rows), 3)
    written(rows, "as_json/fictional_knowledge.json")
    (tmp_path / "as_json" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    assert load_fictional_knowledge(tmp_path / "as_json", 3) == expected
    file = tmp_path / "as_parquet" / "data" / "train-00000-of-00001.parquet"
    file.parent.mkdir(parents=True)
    cached_here.Dataset.from_list(rows).to_parquet(str(file))
    assert load_fictional_knowledge(tmp_path / "as_parquet", 3) == expected
    assert load_fictional_knowledge(file, 3) == expected


def test_the_hub_out_of_reach_says_so(cached_here):
    said = r"datasets cannot read kaist-ai/fictional-knowledge \(.*\); check the name and the conn"
    with pytest.raises(KelibError, match=said):
        load_fictional_knowledge()


def test_without_datasets_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(KelibError, match=r"needs the package datasets: pip install '.\[hub\]'"):
        load_fictional_knowledge()


def test_nothing_heavy_is_imported_before_it_is_needed():
    code = "import sys, kelib.fictional; print({'torch', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("train_context", "  ", "entry 2: train_context is empty"),
        ("train_context", ["a"], "entry 2: train_context is of type list, must be text"),
        ("mem_input", "a text", "entry 2: mem_input is of type str, must be a list of texts"),
        ("mem_target", ["a"] * 4, "entry 2: mem_target has 4 texts, must have 5"),
        ("gen_target", ["a", "", "a", "a", "a"], r"entry 2: gen_target\[1\] is empty"),
        ("gen_input", ["a", 7, "a", "a", "a"], r"entry 2: gen_input\[1\] is of type int, must be"),
        ("hard_gen_target", [], "entry 2: hard_gen_target has 0 texts, must have 5"),
        ("hard_gen_input", None, "entry 2: hard_gen_input is of type NoneType"),
        ("paraphrases", ["a"] * 8 + [" "], r"entry 2: paraphrases\[8\] is empty"),
        ("paraphrases", "a text", "entry 2: paraphrases is of type str, must be a list"),
    ],
)
def test_entry_and_field_are_named(written, rows, field, value, said):
    rows[2][field] = value
    with pytest.raises(KelibError, match=rf"data\.json, {said}"):
        load_fictional_knowledge(written(rows), 3)


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_field_is_named_with_those_there(written, rows, field):
    broken = copy.deepcopy(rows)
    del broken[4][field]
    with pytest.raises(KelibError, match=f"entry 4 has no field {field}; it has .*paraphrases"):
        load_fictional_knowledge(written(broken), 3)


def test_an_entry_without_paraphrases_cannot_be_in_the_paraphrase_set(written, rows):
    path = written(rows)
    said = (
        "entry 3: paraphrases has 0 texts, an entry of the paraphrase set needs 9; pass "
        "paraphrase_entries=3, as the 3 entries before it have them"
    )
    with pytest.raises(KelibError, match=said):
        load_fictional_knowledge(path)
    del rows[4]["paraphrases"]  # the once set may lack the field
    assert len(load_fictional_knowledge(written(rows), 0)[0]) == 5


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "must hold a list of entries, at least one"),
        ({"a": 1}, "must hold a list of entries"),
        (["text"], "entry 0 is of type str, must be an object with fields"),
    ],
)
def test_what_is_no_list_of_entries_is_refused(written, rows, said):
    with pytest.raises(KelibError, match=said):
        load_fictional_knowledge(written(rows))


def test_sources_that_cannot_be(tmp_path, written, rows):
    with pytest.raises(KelibError, match=r"no file or folder .*nowhere.json; give one, or the id"):
        load_fictional_knowledge(tmp_path / "nowhere.json")
    (tmp_path / "text.csv").write_text("a,b")
    with pytest.raises(KelibError, match=r"text.csv must be one of .json, .jsonl, .parquet"):
        load_fictional_knowledge(tmp_path / "text.csv")
    (tmp_path / "cut.json").write_text('[{"train_context": ')
    with pytest.raises(KelibError, match=r"cut.json is not valid JSON: Expecting value"):
        load_fictional_knowledge(tmp_path / "cut.json")
    (tmp_path / "latin.json").write_bytes(b'["\xe9"]')
    with pytest.raises(KelibError, match=r"latin.json is not valid JSON: 'utf-8' codec"):
        load_fictional_knowledge(tmp_path / "latin.json")
    with pytest.raises(KelibError, match="paraphrase_entries = -1 must be at least 0"):
        load_fictional_knowledge(written(rows), -1)
    with pytest.raises(KelibError, match="has 5 entries, fewer than paraphrase_entries = 6"):
        load_fictional_knowledge(written(rows), 6)
