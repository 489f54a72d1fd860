"""The catalogue of published checkpoints, the lock of their revisions, and what a step means."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from hub_server import Hub

from kelib.catalogue import CATALOGUE, catalogue, catalogued, pin, revisions_of
from kelib.errors import KelibError
from kelib.revisions import Revision, ordered, pick, read_name

REPO = "me/tiny"
# as allenai/OLMo-1B-hf names them around its gap
OLMO = ("step20000-tokens84B", "step117850-tokens494B", "step330000-tokens1384B", "main")


def commit(name: str) -> str:
    return f"{sum(name.encode()):040x}"


def revisions(*names: str) -> list[Revision]:
    return ordered(REPO, {name: commit(name) for name in names})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with three revisions of me/tiny, which the client of this process asks."""
    with Hub() as server:
        for name in ("main", "step0", "step1000"):
            server.put(REPO, name, {"config.json": name.encode()})
        server.asked_for_models(monkeypatch, tmp_path / "cache")
        yield server


# --- the catalogue ---------------------------------------------------------------------------


def test_catalogue_of_the_repository_is_whole() -> None:
    models = catalogue()
    sizes = ("14m", "31m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")
    wanted = {f"pythia-{size}" for size in sizes}
    wanted |= {"olmo-1b", "olmo-7b", "olmo-1b-0724", "olmo-2-1b", "olmo-2-1b-early", "olmoe"}
    wanted |= {f"polypythia-{size}-seed{n}" for size in sizes[:5] for n in range(1, 10)}
    wanted |= {f"polypythia-160m-{k}-seed{n}" for k in ("data", "weight") for n in (1, 2, 3)}
    assert set(models) == wanted
    assert len({model.repo for model in models.values()}) == len(models)
    assert models["olmo-1b"].repo == "allenai/OLMo-1B-hf"
    assert "117850" in " ".join(models["olmo-1b"].remarks)
    assert all(model.tokens_per_step and model.remarks for model in models.values())


def test_names_published_with_tokens_fit_the_steps_of_the_catalogue() -> None:
    models = catalogue()
    for model, name in (
        ("olmo-1b", "step738020-tokens3094B"),
        ("olmo-7b", "step556000-tokens2460B"),
        ("olmo-1b-0724", "step1454000-tokens3048B"),
        ("olmo-2-1b", "stage1-step1907359-tokens4001B"),
        ("olmo-2-1b-early", "stage1-step1000-tokens3B"),
        ("olmo-2-1b", "stage2-ingredient1-step23852-tokens51B"),
        ("olmoe", "step1200000-tokens5033B"),
    ):
        read = read_name(REPO, name, commit(name))
        assert read.step is not None and read.tokens_fit(models[model].tokens_per_step), name
        assert not read.tokens_fit(2 * models[model].tokens_per_step), name


def test_a_model_is_found_by_name_by_id_and_outside_the_catalogue() -> None:
    assert catalogued("pythia-70m") == catalogued("EleutherAI/pythia-70m")
    other = catalogued(REPO)
    assert (other.name, other.repo, other.tokens_per_step) == ("me--tiny", REPO, None)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("olmo1b", "olmo-1b"), ("pythia-2.8", "pythia-2.8b"), ("a/b/c", "olmo-1b"), ("/", "olmo-1b")],
)
def test_an_unknown_name_gives_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(KelibError, match=r"has no model .*; the nearest are .*owner/name") as told:
        catalogued(name)
    assert nearest in str(told.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[0].pop("source"), "missing key .* row 1.source"),
        (lambda rows: rows[0].update(tokens_per_step="4M"), "tokens_per_step = '4M' must be"),
        (lambda rows: rows[0].update(tokens_per_step=0), "tokens_per_step = 0 must be above 0"),
        (lambda rows: rows[0]["models"][0].update(repo="OLMo"), "'OLMo' must be owner/name"),
        (lambda rows: rows[0]["models"][0].update(steps=[1]), "unknown key .*steps"),
        (lambda rows: rows[1]["models"][0].update(name="olmo-1b"), "row 2: name 'olmo-1b' occurs"),
        (lambda rows: rows.clear(), "must hold a list of rows under 'families'"),
    ],
)
def test_malformed_rows_are_refused(tmp_path: Path, change: Callable, message: str) -> None:
    content = yaml.safe_load(CATALOGUE.read_text(encoding="utf-8"))
    change(content["families"])
    path = tmp_path / "catalogue.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(KelibError, match=message):
        catalogue(path)


# --- names and steps -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stage", "step", "tokens"),
    [
        ("step143000", "", 143000, None),
        ("step0-tokens0B", "", 0, 0),
        ("stage1-step300-tokens1B", "stage1", 300, 1),
        ("stage2-ingredient3-step23852-tokens51B", "stage2-ingredient3", 23852, 51),
        ("main", "", None, None),
        ("fp32", "", None, None),
        ("step1000-tokens4B-old", "", None, None),
        ("refs/step10", "", None, None),
    ],
)
def test_names_are_read(name: str, stage: str, step: int | None, tokens: int | None) -> None:
    read = read_name(REPO, name, commit(name))
    assert (read.stage, read.step, read.tokens, read.name) == (stage, step, tokens, name)


def test_revisions_are_ordered_by_stage_and_step() -> None:
    names = ("main", "stage2-ingredient1-step1000", "stage1-step20000", "stage1-step3000")
    shown = [revision.name for revision in revisions(*names)]
    assert shown == ["stage1-step3000", "stage1-step20000", names[1], "main"]


@pytest.mark.parametrize(
    ("choice", "step", "found"),
    [
        ("exact", 20000, "step20000-tokens84B"),
        ("below", 200_000, "step117850-tokens494B"),
        ("above", 200_000, "step330000-tokens1384B"),
        ("nearest", 200_000, "step117850-tokens494B"),
        ("nearest", 223_925, "step117850-tokens494B"),  # as near both: the lower
        ("nearest", 223_926, "step330000-tokens1384B"),
        ("nearest", 10**6, "step330000-tokens1384B"),
        ("nearest", 0, "step20000-tokens84B"),
        ("below", 330_000, "step330000-tokens1384B"),
    ],
)
def test_a_step_is_picked_by_choice(choice: str, step: int, found: str) -> None:
    (revision,) = pick(revisions(*OLMO), [step], choice)
    assert (revision.name, revision.commit) == (found, commit(found))


def test_steps_keep_their_order() -> None:
    chosen = pick(revisions(*OLMO), [330_000, 20_000])
    assert [revision.step for revision in chosen] == [330_000, 20_000]


@pytest.mark.parametrize(
    ("steps", "choice", "message"),
    [
        (
            [200_000],
            "exact",
            "no revision at step 200000; the nearest are step117850-tokens494B below and "
            "step330000-tokens1384B above; .* set choice to below or above",
        ),
        ([10], "exact", "the nearest are step20000-tokens84B above; .* set choice to above$"),
        ([10], "below", "no revision below step 10; the nearest is step20000-tokens84B above"),
        ([10**6], "above", "no revision above step 1000000; the nearest is step330000-.* below"),
        ([200_000, 250_000], "below", "steps 200000 and 250000 both lead to step117850-.*leave"),
        ([1], "closest", "choice = 'closest' must be one of above, below, exact, nearest"),
    ],
)
def test_a_step_that_is_not_there_is_no_guess(steps: list, choice: str, message: str) -> None:
    with pytest.raises(KelibError, match=message):
        pick(revisions(*OLMO), steps, choice)


def test_stages_are_not_mixed() -> None:
    both = revisions("stage1-step1000-tokens3B", "stage2-ingredient1-step1000-tokens3B", "main")
    with pytest.raises(KelibError, match="set stage to one of stage1, stage2-ingredient1"):
        pick(both, [1000])
    with pytest.raises(KelibError, match="stage = 'stage3' must be one of stage1"):
        pick(both, [1000], stage="stage3")
    assert pick(both, [1000], stage="stage2-ingredient1")[0].name.startswith("stage2")


def test_a_step_with_two_names_and_names_without_steps_are_refused() -> None:
    with pytest.raises(KelibError, match=r"step 10 twice, as step10, step10-tokens0B; give one"):
        pick(revisions("step10", "step10-tokens0B"), [10])
    with pytest.raises(KelibError, match=r"no revision of me/tiny names a step .*fp32, main"):
        pick(revisions("main", "fp32"), [10])


# --- the lock --------------------------------------------------------------------------------


def test_revisions_are_listed_once_and_pinned(hub: Hub, tmp_path: Path) -> None:
    lock = tmp_path / "revisions.lock.yaml"
    first = revisions_of(REPO, lock)
    assert [revision.name for revision in first] == ["step0", "step1000", "main"]
    assert {revision.name: revision.commit for revision in first} == hub.branches[REPO]
    asked, was = len(hub.asked), hub.branches[REPO]["step0"]
    assert hub.put(REPO, "step0", {"config.json": b"moved"}) != was
    assert revisions_of(REPO, lock) == first  # by the lock alone
    assert len(hub.asked) == asked
    assert lock.read_text(encoding="utf-8").startswith("# The revisions that the model hub listed")


def test_pins_stay_when_the_hub_changes(hub: Hub, tmp_path: Path) -> None:
    lock = tmp_path / "revisions.lock.yaml"
    first = {revision.name: revision.commit for revision in revisions_of(REPO, lock)}
    moved = hub.put(REPO, "step0", {"config.json": b"moved"})
    new = hub.put(REPO, "step2000", {})
    del hub.branches[REPO]["step1000"]
    revisions, differ = pin(REPO, lock)
    now = {revision.name: revision.commit for revision in revisions}
    assert now == first | {"step2000": new}
    assert differ == {
        "step0": f"now at {moved[:12]} on the hub",
        "step1000": "listed no more on the hub",
    }
    assert [r.name for r in revisions_of(REPO, lock)] == ["step0", "step1000", "step2000", "main"]


def test_models_stand_beside_each_other_in_the_lock(hub: Hub, tmp_path: Path) -> None:
    lock = tmp_path / "revisions.lock.yaml"
    hub.put("me/other", "main", {})
    for repo in (REPO, "me/other"):
        revisions_of(repo, lock)
    assert list(yaml.safe_load(lock.read_text())) == ["me--other", "me--tiny"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must be a mapping of models; restore it"),
        ("me--tiny: {repo: me/tiny, revisions: {step0: abc}}", "a commit of 40 hexadecimal"),
        ("me--tiny: {repo: me/tiny}", "entry me--tiny must have a repo and revisions"),
        (f"me--tiny: {{repo: me/old, revisions: {{a: {'a' * 40}}}}}", "pins me--tiny in me/old"),
        ("me--tiny: {", "is not valid YAML"),
    ],
)
def test_a_malformed_lock_is_refused(tmp_path: Path, text: str, message: str) -> None:
    lock = tmp_path / "revisions.lock.yaml"
    lock.write_text(text)
    with pytest.raises(KelibError, match=message):
        revisions_of(REPO, lock)


def test_without_a_network_the_missing_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(KelibError) as told:  # HF_HUB_OFFLINE, as conftest sets it
        revisions_of("olmo-1b", tmp_path / "lock.yaml")
    said = str(told.value)
    assert f"the revisions of olmo-1b are not in {tmp_path / 'lock.yaml'}" in said
    assert "HF_HUB_OFFLINE forbids" in said and "hf download allenai/OLMo-1B-hf" in said
    assert "models--allenai--OLMo-1B-hf" in said and "\n" not in said
