"""``python -m kelib``: what the Makefile calls. Refusals print one line and exit with 1 (2 of
``verify``)."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from kelib import arguments as arguments_of
from kelib.errors import KelibError, lacks_memory, listing
from kelib.redaction import hide_in_logs


def _notebook(arguments: argparse.Namespace) -> None:
    from kelib.notebooks import run_notebook
    from kelib.temporary import end_with_parent

    if "MAKELEVEL" in os.environ:
        end_with_parent()
    parameters = _parameters(arguments.parameter)
    run_notebook(Path(arguments.notebook), Path(arguments.output), parameters)
    note = f" ({arguments.note})" if arguments.note else ""
    print(f"{Path(arguments.notebook).name} -> {arguments.output}{note}")


def _parameters(pairs: list[str]) -> dict[str, Any]:
    """Values by name; text that is not JSON is text."""
    parameters: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise KelibError(f"parameter {pair!r} must look like name=value")
        try:
            parameters[name] = json.loads(text)
        except json.JSONDecodeError:
            parameters[name] = text
    return parameters


def _profile(arguments: argparse.Namespace) -> None:
    from kelib.any_profile import download_line, summary

    print(summary(arguments.profile))
    if line := download_line(arguments.profile):
        print(line)


def _data(arguments: argparse.Namespace) -> None:
    from kelib.any_profile import fetch_data

    fetch_data(arguments.profile)


def _status(arguments: argparse.Namespace) -> None:
    from kelib.any_profile import print_states

    print_states(arguments.profile)


def _plan(arguments: argparse.Namespace) -> None:
    from kelib import plan_report

    if arguments.check:
        plan_report.check(arguments.profile, data=arguments.data, anew=arguments.calibrate)
        return
    plan_report.plan(
        arguments.profile,
        arguments.figures,
        data=arguments.data,
        mfu=arguments.mfu,
        counts_only=arguments.counts_only,
        anew=arguments.calibrate,
    )


def _injection(arguments: argparse.Namespace) -> None:
    from kelib import stages
    from kelib.injection import encode_passages, format_schedule, injection_schedule
    from kelib.world import build_world

    study = stages.open_study(arguments.profile)
    plan, seed = study.profile.continual, study.profile.seeds[0]
    if arguments.seed is not None:
        seed = arguments.seed
    cl_seed = plan.seeds[0] if arguments.cl_seed is None else arguments.cl_seed
    world, corpus = build_world(study.profile.corpus.world, seed), study.corpus_run(seed)
    counts = (len(world.once), len(world.paraphrase), plan.injections, plan.steps, plan.batch_size)
    known: dict[str, Any] = {}
    if corpus.done:  # its tokenizer says how long the passages are
        from transformers import AutoTokenizer

        from kelib.corpus import load_corpus

        packed = load_corpus(corpus.folder)
        tokenizer = AutoTokenizer.from_pretrained(packed.tokenizer_folder)
        entries = {"once": world.once, "paraphrase": world.paraphrase}
        known["passages"] = encode_passages(tokenizer, entries)
        known["sequence_length"] = packed.manifest["sequence_length"]
    print(format_schedule(injection_schedule(*counts, cl_seed, **known)))
    if not known:
        print("\nThe corpus is not built, so passages are taken to fit their sequences.")


def _clean(arguments: argparse.Namespace) -> None:
    from kelib.any_profile import clean

    clean(arguments.profile)


def _reference(arguments: argparse.Namespace) -> None:
    from kelib.reference import promote

    promote(arguments.profile)


def _report(arguments: argparse.Namespace) -> None:
    from kelib.report import build_report

    built = build_report(arguments.profile, arguments.source, arguments.output, arguments.figures)
    size = built.file.stat().st_size / 1e6
    print(
        f"{built.file}: {len(built.figures)} figures, {len(built.charts)} charts, {size:.1f} MB, "
        "opens from disk"
    )
    if built.missing:
        print(f"not drawn yet: {listing(built.missing, 50)}; the page says how")


def _execute(arguments: argparse.Namespace) -> None:
    from kelib.config import repository_root
    from kelib.reference import execute_all, execute_in_place

    for notebook in arguments.notebooks:
        execute_in_place(Path(notebook).resolve())
    if not arguments.notebooks:
        execute_all(repository_root())


def _entropy(arguments: argparse.Namespace) -> None:
    from kelib.command import run

    run({name: value for name, value in vars(arguments).items() if name != "do"})


def _docs(arguments: argparse.Namespace) -> None:
    from kelib.api_pages import modules, write_pages

    write_pages(arguments.folder, modules())
    print(f"open {arguments.folder / 'index.html'}")


def _doctor(arguments: argparse.Namespace) -> int:
    from kelib.doctor import doctor

    return doctor(arguments.environment)


def _memories(arguments: argparse.Namespace) -> None:
    from kelib.memories import measure_memories

    print(measure_memories(arguments.profile, arguments.layers))


def _sliders(arguments: argparse.Namespace) -> None:
    from kelib.config import load_profile, repository_root
    from kelib.sliders import REFERENCE, measure_grid
    from kelib.study import Study

    data = repository_root() / "data"
    study = Study(load_profile(arguments.profile), arguments.data or data)
    seed = study.profile.seeds[0] if arguments.seed is None else arguments.seed
    folder = data / "measurements" / REFERENCE
    measure_grid(study, seed, folder)
    print(folder)


def _audit(arguments: argparse.Namespace) -> None:
    from kelib.audit import run

    run(arguments.model, arguments.lock, arguments.folder)


def _learn(arguments: argparse.Namespace) -> None:
    from kelib.learning import run

    given = {name: value for name, value in vars(arguments).items() if name != "do"}
    parameters = _parameters(given.pop("parameter"))
    run({**given, "parameters": parameters})


def _verify(arguments: argparse.Namespace) -> int:
    from kelib.verify_command import run

    try:
        given = {name: value for name, value in vars(arguments).items() if name != "do"}
        return run(**{**given, "strict": given["strict"] == "strict"})
    except (KelibError, OSError) as error:
        print(f"kelib: {error}", file=sys.stderr)
        return 2  # 1 is a real difference


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, do it, return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m kelib", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser("notebook", help="run a notebook with parameters")
    one.add_argument("notebook")
    one.add_argument("output")
    one.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE")
    one.add_argument("--note", default="", help="said when it is done")
    one.set_defaults(do=_notebook)
    for name, do, text in (
        ("profile", _profile, "check a profile and print its digest"),
        ("data", _data, "fetch and verify the text a profile needs"),
        ("status", _status, "how many runs are done, running, failed, missing"),
        ("clean", _clean, "delete what a profile computed"),
        ("reference", _reference, "promote a finished profile to the committed reference"),
    ):
        sub = commands.add_parser(name, help=text)
        sub.add_argument("profile")
        sub.set_defaults(do=do)
    one = commands.add_parser("plan", help="what a profile will cost, before anything is done")
    arguments_of.add_plan(one)
    one.set_defaults(do=_plan)
    one = commands.add_parser("report", help="one page of a profile's claims and figures")
    one.add_argument("profile")
    one.add_argument("figures", nargs="*", help="that it should have (default: all of the profile)")
    one.add_argument("--source", default="measurements", help="measurements (default) or reference")
    one.add_argument("--output", type=Path, help="default: figures/PROFILE/report.html")
    one.set_defaults(do=_report)
    one = commands.add_parser("execute", help="run notebooks in place, with their own parameters")
    one.add_argument("notebooks", nargs="*", help="default: all of them")
    one.set_defaults(do=_execute)
    one = commands.add_parser("injection", help="print the injection schedule of a profile")
    one.add_argument("profile")
    one.add_argument("--seed", type=int, help="pretraining seed (default: the first)")
    one.add_argument("--cl-seed", type=int, help="continual-learning seed (default: the first)")
    one.set_defaults(do=_injection)
    one = commands.add_parser("entropy", help="measure a model of your own over a text")
    arguments_of.add_entropy(one)
    one.set_defaults(do=_entropy)
    one = commands.add_parser("docs", help="write the API reference")
    one.add_argument("folder", type=Path)
    one.set_defaults(do=_docs)
    one = commands.add_parser("doctor", help="what is missing on this machine")
    one.add_argument("--environment", type=Path, help="folder (default: the Python that runs this)")
    one.set_defaults(do=_doctor)
    one = commands.add_parser("memories", help="single layers of a published model, by memory")
    one.add_argument("profile", nargs="?", default="smollm2", help="default: %(default)s")
    one.add_argument("--layers", type=int, nargs="+", default=[1, 12, 30], metavar="N")
    one.set_defaults(do=_memories)
    one = commands.add_parser("sliders", help="resuscitation at many p and q, for ours_sliders")
    one.add_argument("profile", help="a finished study")
    one.add_argument("--seed", type=int, help="pretraining seed (default: the first)")
    one.add_argument("--data", type=Path, help="folder of its runs (default: data)")
    one.set_defaults(do=_sliders)
    one = commands.add_parser("audit", help="are the published checkpoints of a model sound?")
    one.add_argument("model", nargs="?", help="of data/catalogue.yaml, or owner/name on the hub")
    one.add_argument("--lock", type=Path, metavar="FILE", help="another lock of revisions")
    one.add_argument("--folder", type=Path, metavar="DIR", help="another place for the table")
    one.set_defaults(do=_audit)
    one = commands.add_parser("learn", help="continual learning of one model, on one GPU or many")
    arguments_of.add_learn(one)
    one.set_defaults(do=_learn)
    one = commands.add_parser("verify", help="fresh measurements beside the committed reference")
    arguments_of.add_verify(one)
    one.set_defaults(do=_verify)
    chosen = parser.parse_args(arguments)
    hide_in_logs()
    try:
        status: int = chosen.do(chosen) or 0
        return status
    except KelibError as error:
        print(f"kelib: {error}", file=sys.stderr)
        return 1
    except (OSError, MemoryError, ImportError) as error:
        if lacks_memory(error):
            print(f"kelib: memory is not enough ({error}); free some, run again", file=sys.stderr)
        elif isinstance(error, OSError):
            where = error.filename or "a file"
            why = f"{error.strerror or error}; free space or choose a place that can be written"
            print(f"kelib: cannot read or write {where}: {why}", file=sys.stderr)
        else:
            raise
        return 1


if __name__ == "__main__":
    sys.exit(main())
