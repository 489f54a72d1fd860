"""The audit of published checkpoints, against a hub on this machine and the real client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hub_server import Hub, parts, sha256, tensors, whole
from huggingface_hub import __version__, constants

from kelib import hub as asking
from kelib.audit import audit, refuse_bad, run
from kelib.catalogue import revisions_of
from kelib.checkpoint_files import broken_parts, find_weights
from kelib.config import repository_root
from kelib.errors import KelibError
from kelib.hub import Header, HubFile
from kelib.tables import read_provenance, read_table

REPO = "me/tiny"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
BESIDE = {
    "config.json": b'{"model_type": "olmo", "hidden_size": 16, "transformers_version": "4.40"}',
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b"{}",
    "README.md": b"words",
}


def fill(hub: Hub) -> None:
    """Revisions of me/tiny: three that are sound, and one of each kind that is not."""

    def put(step: int, files: dict[str, bytes], **beside: bytes | None) -> None:
        changed = BESIDE | {name.replace("__", "."): text for name, text in beside.items()}
        kept = {name: text for name, text in changed.items() if text is not None}
        hub.put(REPO, f"step{step}", kept | files)

    sound = {step: parts(tensors(step)) for step in range(0, 13_000, 1000)}
    for step in (0, 1000):
        put(step, sound[step])
    put(2000, sound[2000], config__json=BESIDE["config.json"].replace(b"4.40", b"5.0"))
    put(3000, sound[3000])
    put(4000, sound[3000])  # the weights of step 3000
    put(5000, sound[5000] | {SECOND: sound[5000][SECOND][:-100]})
    put(6000, {name: text for name, text in sound[6000].items() if name != SECOND})
    put(7000, sound[7000], tokenizer__json=b'{"version": "1.1"}')
    put(8000, parts(tensors(8000, "float16")))
    put(9000, sound[9000] | {FIRST: sound[0][FIRST]})  # a part of step 0
    put(10_000, {"pytorch_model.bin": b"a pickle"})
    put(11_000, sound[11_000], config__json=b'{"model_type": "olmo", "hidden_size": 8}')
    put(12_000, sound[12_000], config__json=None, tokenizer__json=None, tokenizer_config__json=None)
    hub.put(REPO, "main", BESIDE | sound[1000])  # the last that its authors trust


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The hub, asked by the client of this process, and the audit of me/tiny, made once."""
    home = tmp_path_factory.mktemp("audit")
    lock, folder = home / "lock.yaml", home / "audit"
    with Hub() as hub, pytest.MonkeyPatch.context() as patch:
        hub.asked_for_models(patch, home / "cache")
        patch.setenv("KELIB_PROGRESS", "lines")
        fill(hub)
        table = audit(REPO, lock, folder).set_index("revision")
        asked = [request for request in hub.asked if f"/{REPO}/" in request[1]]
        yield SimpleNamespace(hub=hub, lock=lock, folder=folder, table=table, asked=asked)


# --- what a user calls -----------------------------------------------------------------------


def test_command_audits_through_hf_endpoint(tmp_path: Path) -> None:
    """The client reads HF_ENDPOINT when it is imported: in a process of its own, as for a user."""
    script = (
        "import sys; from kelib.__main__ import main; status = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    places = ["--lock", str(tmp_path / "lock.yaml"), "--folder", str(tmp_path)]
    with Hub() as hub:
        fill(hub)
        done = subprocess.run(
            [sys.executable, "-c", script, "audit", REPO, *places],
            env=hub.environment(tmp_path / "home"), capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "me--tiny (me/tiny): 14 revisions, 3 sound, 3 check, 8 bad" in done.stdout
    assert "bad   step4000: same weights as step3000" in done.stdout
    table = read_table(tmp_path / "me--tiny.csv").set_index("revision")
    assert set(table[table["verdict"] == "bad"].index) == {
        *("step0", "step3000", "step4000", "step5000", "step6000", "step9000", "step10000"),
        "step12000",
    }
    weights = [
        (path, span) for _, path, span in hub.asked if path.endswith((".safetensors", "bin"))
    ]
    assert weights and all(span in ("bytes=0-7", "bytes=0-100000") for _, span in weights)
    assert hub.tokens == {None}


def test_no_model_lists_those_of_the_catalogue() -> None:
    with pytest.raises(KelibError, match=r"olmo-1b, .* more\) .*make audit MODEL=olmo-1b"):
        run("")


def test_make_audits_a_model() -> None:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    done = subprocess.run(
        ["make", "USE_ENV=1", f"PYTHON={sys.executable}", "audit", "MODEL=olmo1b"],
        cwd=repository_root(), env=inherited, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "kelib: the catalogue has no model 'olmo1b'; the nearest are olmo-1b" in done.stderr


def test_table_is_kept_with_its_provenance(there: SimpleNamespace) -> None:
    path = there.folder / "me--tiny.csv"
    kept = read_table(path)
    assert list(kept["revision"]) == list(there.table.index)
    assert list(kept["commit"]) == list(there.table["commit"])
    note = read_provenance(path)
    assert note["parameters"] == {"audit": "me--tiny", "repo": REPO, "tokens_per_step": None}
    assert note["versions"]["huggingface_hub"] == __version__
    assert {r.name: r.commit for r in revisions_of(REPO, there.lock)} == dict(
        zip(kept["revision"], kept["commit"], strict=True)
    )


# --- what it finds ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("revision", "verdict", "said"),
    [
        ("step1000", "sound", ""),
        ("step2000", "sound", ""),  # another transformers_version is no change
        ("main", "sound", ""),
        ("step3000", "bad", "same weights as step4000"),
        ("step4000", "bad", "same weights as step3000"),
        ("step5000", "bad", f"{SECOND} is cut short: "),
        ("step6000", "bad", f"missing {SECOND} of 2 parts"),
        ("step7000", "check", "tokenizer differs in tokenizer.json"),
        ("step8000", "check", "dtype F16, elsewhere F32"),
        ("step9000", "bad", f"its {FIRST} is also that of step0"),
        ("step0", "bad", f"its {FIRST} is also that of step9000"),
        ("step10000", "bad", "no safetensors, only pytorch_model.bin"),
        ("step11000", "check", "config: hidden_size is 8, elsewhere 16"),
        ("step12000", "bad", "no config.json that can be read; no tokenizer"),
    ],
)
def test_verdicts(there: SimpleNamespace, revision: str, verdict: str, said: str) -> None:
    row = there.table.loc[revision]
    assert row["verdict"] == verdict
    text = "; ".join(part for part in (row["problems"], row["remarks"]) if part)
    assert text.startswith(said) and bool(text) == bool(said), text


def test_numbers_are_those_of_the_files(there: SimpleNamespace) -> None:
    files = there.hub.commits[REPO, there.hub.branches[REPO]["step5000"]]
    row = there.table.loc["step5000"]
    full = len(parts(tensors(5000))[SECOND])
    assert f"{full - 100:,} of {full:,} bytes" in row["problems"]
    assert row["bytes"] == len(files[FIRST]) + len(files[SECOND])
    lines = f"{sha256(files[FIRST])}  {FIRST}\n{sha256(files[SECOND])}  {SECOND}\n"
    assert row["weights_sha256"] == sha256(lines.encode())
    assert (row["step"], row["form"], row["dtype"]) == (5000, "safetensors", "F32")
    assert row["parameters"] == 4 * 8 * 16
    wanted = {"config.json", "tokenizer.json", "tokenizer_config.json", INDEX, FIRST, SECOND}
    assert set(row["files"].split()) == wanted
    assert there.table.loc["step6000", "weights_sha256"] == ""  # of a half there is none
    assert there.table.loc["main", "same_as"] == "step1000"


def test_each_shared_file_is_asked_about_once(there: SimpleNamespace) -> None:
    configs = [path for _, path, _ in there.asked if path.endswith("/config.json")]
    assert len(configs) == 3  # though 13 revisions have one
    heads = [path for _, path, span in there.asked if span == "bytes=0-7"]
    blobs = {
        sha256(files[name])
        for files in (there.hub.commits[REPO, commit] for commit in there.table["commit"])
        for name in (FIRST, SECOND)
        if name in files
    }
    assert len(heads) == len(blobs)


def test_a_model_in_one_file(there: SimpleNamespace) -> None:
    for step, tokens in ((1000, 2), (2000, 4), (3000, 90)):
        name = f"step{step}-tokens{tokens}B"
        there.hub.put("me/single", name, BESIDE | whole(tensors(step)))
    content = whole(tensors(9))["model.safetensors"]
    there.hub.put("me/single", "step4000-tokens8B", BESIDE | {"model.safetensors": content + b"!"})
    there.hub.put("me/single", "step5000-tokens10B", BESIDE | {"model.safetensors": content[:40]})
    there.hub.put("me/single", "step6000-tokens12B", BESIDE | {"model.safetensors": b"short"})
    table = audit("me/single", there.lock, there.folder).set_index("step")
    assert list(table["verdict"]) == ["sound"] * 3 + ["bad"] * 3
    assert table.loc[1000, "weights_sha256"] == sha256(whole(tensors(1000))["model.safetensors"])
    assert (
        f"has {len(content) + 1:,} bytes, its header says {len(content):,}"
        in (table.loc[4000, "problems"])
    )
    for step in (5000, 6000):
        assert "model.safetensors has no whole header" in table.loc[step, "problems"]


def test_tokens_that_do_not_fit_and_moved_branches_are_remarked(there: SimpleNamespace) -> None:
    repo = "allenai/OLMo-1B-0724-hf"  # a catalogue name, so that tokens per step are known
    for name in ("step1000-tokens2B", "step2000-tokens9B"):
        there.hub.put(repo, name, BESIDE | whole(tensors(len(name) + int(name[4]))))
    audit("olmo-1b-0724", there.lock, there.folder)
    moved = there.hub.put(repo, "step1000-tokens2B", BESIDE | whole(tensors(77)))
    table = audit("olmo-1b-0724", there.lock, there.folder).set_index("step")
    assert table.loc[1000, "remarks"] == f"now at {moved[:12]} on the hub"
    assert table.loc[2000, "remarks"] == "its name's tokens do not fit steps of 2,097,152"
    assert table.loc[1000, "commit"] != moved


# --- parts of a checkpoint, by themselves ------------------------------------------------------


def described(*names: str) -> dict[str, HubFile]:
    return {name: HubFile(name, 100, f"hash of {name}") for name in names}


def test_weights_are_found_in_the_order_of_transformers() -> None:
    both = described("model.safetensors", "pytorch_model.bin", INDEX)
    assert [part.name for part in find_weights(both, None).parts] == ["model.safetensors"]
    assert find_weights(described("README.md"), None).problems == ("no weights",)
    loose = find_weights(described(FIRST, SECOND), None)
    assert loose.problems == (f"its parts have no {INDEX}",) and len(loose.parts) == 2
    for index in (None, [], {"weight_map": [1]}, {"weight_map": {"a": 1}}):
        assert find_weights(described(INDEX), index).problems == (f"{INDEX} is not an index",)


def test_tensors_that_a_part_lacks_are_named() -> None:
    index = {"weight_map": {"a": FIRST, "b": FIRST}}
    weights = find_weights(described(FIRST, INDEX), index)
    header = Header(100, 92, frozenset("a"), {"F32": 23})
    said = broken_parts(weights, {f"hash of {FIRST}": header})
    assert said == [f"{FIRST} lacks b, which the index has in it"]


def test_pickles_are_held_against_the_index() -> None:
    names = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
    index = {
        "metadata": {"total_size": 201},
        "weight_map": dict(zip("ab", names, strict=True)),
    }
    weights = find_weights(described(*names, "pytorch_model.bin.index.json"), index)
    assert weights.form == "pickle" and "only the pickles" in weights.problems[0]
    assert broken_parts(weights, {}) == ["cut short: 200 of 201 bytes"]


def test_an_index_that_disagrees_with_the_headers_is_remarked(there: SimpleNamespace) -> None:
    files = parts(tensors(5))
    index = json.loads(files[INDEX])
    index["metadata"]["total_size"] += 8
    there.hub.put("me/index", "main", BESIDE | files | {INDEX: json.dumps(index).encode()})
    table = audit("me/index", there.lock, there.folder)
    nbytes = 4 * np.zeros((8, 16), "float32").nbytes
    assert table.loc[0, "remarks"] == (
        f"the index says {nbytes + 8:,} bytes of tensors, the headers {nbytes:,}"
    )


# --- what the study asks -----------------------------------------------------------------------


def chosen(there: SimpleNamespace, *names: str) -> list:
    known = {revision.name: revision for revision in revisions_of(REPO, there.lock)}
    return [known[name] for name in names]


def test_bad_revisions_are_refused_unless_told(there: SimpleNamespace) -> None:
    wanted = chosen(there, "step1000", "step4000", "step7000")
    with pytest.raises(KelibError, match=r"calls bad: step4000 \(same .* step3000\); .*accept"):
        refuse_bad(REPO, wanted, folder=there.folder)
    remarks = refuse_bad(REPO, wanted, ["step4000"], there.folder)
    assert remarks == {"step7000": "tokenizer differs in tokenizer.json"}


def test_what_was_not_audited_is_refused(there: SimpleNamespace, tmp_path: Path) -> None:
    (one,) = chosen(there, "step1000")
    with pytest.raises(KelibError, match=r"not audited, there is no .*make audit MODEL=me/tiny"):
        refuse_bad(REPO, [one], folder=tmp_path)
    assert refuse_bad(REPO, [one], ["step1000"], tmp_path) == {}
    there.hub.put("me/later", "step1", BESIDE | whole(tensors(1)))
    audit("me/later", there.lock, there.folder)
    (later,) = revisions_of("me/later", there.lock)
    other = type(later)(later.repo, later.name, "0" * 40, step=1)
    with pytest.raises(KelibError, match="step1 of me/later was not audited at commit 0000"):
        refuse_bad("me/later", [other], folder=there.folder)


# --- when the hub says no ------------------------------------------------------------------------


def refused(there: SimpleNamespace, repo: str) -> str:
    with pytest.raises(KelibError) as told:
        audit(repo, there.lock, there.folder)
    said = str(told.value)
    assert "\n" not in said and there.hub.address not in said
    return said


def test_an_unknown_repository_gives_the_nearest(there: SimpleNamespace) -> None:
    said = refused(there, "allenai/OLMo-1B-fh")
    assert "no public model allenai/OLMo-1B-fh on the model hub (the nearest of the cata" in said
    assert "allenai/OLMo-1B-hf" in said and "hf auth login" in said


def test_a_gated_repository_says_how_to_get_a_token(
    there: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    there.hub.put("me/gated", "main", BESIDE | whole(tensors(1)))
    there.hub.gated.add("me/gated")
    said = refused(there, "me/gated")
    assert "agree on its page" in said and "'hf auth login' or in HF_TOKEN" in said
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    assert list(audit("me/gated", there.lock, there.folder)["verdict"]) == ["sound"]
    assert "Bearer hf_very_secret" in there.hub.tokens
    note = (there.folder / "me--gated.json").read_text()
    assert "hf_very_secret" not in note + there.lock.read_text()


def test_a_token_that_expired_is_not_shown(
    there: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    said = refused(there, REPO)
    assert "does not take the token in use" in said and "hf_expired" not in said


def test_reasons_show_neither_tokens_nor_addresses() -> None:
    error = OSError("GET https://me:pw@hub.example/x?token=1 with hf_abcDEF failed")
    assert asking.reason(error) == "GET <address> with <token> failed"


def test_a_malformed_id_is_refused(there: SimpleNamespace) -> None:
    assert "'me/ti ny' is not the form of a hub id; give owner/name" in refused(there, "me/ti ny")


def test_a_busy_hub_is_asked_again(there: SimpleNamespace) -> None:
    there.hub.put("me/busy", "main", BESIDE | whole(tensors(1)))
    there.hub.busy = 3
    assert list(audit("me/busy", there.lock, there.folder)["verdict"]) == ["sound"]
    there.hub.busy = 10**6
    assert "the model hub answers 429 about me/again" in refused(there, "me/again")
    there.hub.busy = 0


def test_pauses_are_what_the_hub_says() -> None:
    assert asking._pause({"retry-after": "7"}, 1) == 7
    assert asking._pause({"ratelimit": '"api";r=0;t=55'}, 1) == 55
    assert asking._pause({"retry-after": "86400"}, 1) == asking.LONGEST_WAIT
    assert [asking._pause({}, attempt) for attempt in (1, 2, 3)] == [2, 4, 8]


def test_a_hub_that_cannot_be_reached(
    there: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Hub() as gone:
        address = gone.address
    monkeypatch.setattr(constants, "ENDPOINT", address)
    said = refused(there, "me/unseen")
    assert f"the revisions of me--unseen are not in {there.lock}, and the model hub cannot" in said
    assert "run 'python -m kelib audit me/unseen'" in said and "--revision COMMIT" in said
    assert refused(there, REPO).startswith("the model hub cannot be reached about me/tiny")


def test_a_page_in_place_of_the_hub(
    there: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = f"{there.hub.address}/{REPO}/resolve/main/README.md?instead="
    monkeypatch.setattr(constants, "ENDPOINT", page)
    said = refused(there, "me/unseen")
    assert "what answers in place of the model hub about me/unseen is none" in said


def test_a_pinned_commit_that_is_gone(there: SimpleNamespace, tmp_path: Path) -> None:
    lock = tmp_path / "lock.yaml"
    lock.write_text(f"me--tiny: {{repo: me/tiny, revisions: {{step0: {'a' * 40}}}}}\n")
    with pytest.raises(KelibError, match=r"has no revision aaaa.* any more; delete its entry"):
        audit(REPO, lock, tmp_path)
    assert pd.isna(there.table.loc["main", "step"])
