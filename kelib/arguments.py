"""Arguments of the commands of ``python -m kelib`` that take many: only their names and helps, so
that no command imports what another one needs.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``plan``, most of them named as :func:`kelib.plan_report.plan` takes them."""
    add = parser.add_argument
    add("profile")
    add("figures", nargs="*", help="to tell what each rests on (default: all of the profile)")
    add("--counts-only", action="store_true", help="no hours, so that nothing has to be timed")
    add("--calibrate", action="store_true", help="time this machine again")
    add("--check", action="store_true", help="compare the estimates with the finished runs instead")
    add("--data", type=Path, help="folder of the runs (default: data of the repository)")
    add("--mfu", type=float, default=0.4, help="utilisation of accelerators (default %(default)s)")


def add_entropy(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``entropy``, named as :func:`kelib.command.run` takes them."""
    add = parser.add_argument
    add("model", metavar="MODEL_OR_DIR", help="folder of a model, or its id on the model hub")
    add("--text", required=True, help=".txt, .jsonl, a folder of them, a source, or hub:NAME")
    add("--revision", help="branch, tag or commit of a model on the hub")
    add("--sequences", type=int, default=128, metavar="N", help="how many (default %(default)s)")
    add("--length", type=int, metavar="T", help="tokens of each (default 1024, or the window)")
    add("--batch-size", type=int, default=4, metavar="B", help="at once (default %(default)s)")
    add("--coefficient", default="absolute", help="absolute (the paper's), relu or contribution")
    add("--attention", action="store_true", help="attention entropy too")
    add("--next-token", action="store_true", help="next-token entropy too")
    add("--uncertainty", action="store_true", help="standard errors (jackknife)")
    add("--dtype", default="float32", help="float32 (default), bfloat16 or float16")
    add("--json", metavar="OUT.json", help="write the numbers there")
    add("--save", metavar="OUT.safetensors", help="write the sums, to load and merge later")


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``verify``, named as :func:`kelib.verify_command.run` takes them."""
    add = parser.add_argument
    add("profile")
    add("--against", type=Path, metavar="DIR", help="other tables than data/measurements/PROFILE")
    add("--json", dest="json_path", type=Path, metavar="OUT.json", help="write the comparison")
    add("--claims", dest="strict", choices=("shown", "strict"), default="shown")
    add("--all", dest="everything", action="store_true", help="list all quantities, not those off")
    add("--accept", action="append", default=[], metavar="KEY", help="a parameter that may differ")
    add("--write-variation", dest="keep_variation", action="store_true", help="two machines: keep")


def add_learn(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``learn``, named as :func:`kelib.learning.run` takes them."""
    add = parser.add_argument
    add("profile", help="protocol, precision, micro-batch: a profile of notebooks/params")
    add(
        "-p", "--parameter", action="append", default=[], metavar="KEY=VALUE", help="of the profile"
    )
    add("--model", required=True, help="folder of a checkpoint, or id on the model hub")
    add("--corpus", required=True, metavar="DIR", help="folder of packed sequences")
    add("--out", required=True, metavar="DIR", help="for the result; a state until then")
    add("--text", default="domain", help="domain (default) or general")
    add("--entries", metavar="SOURCE", help="published passages (default: the generated world)")
    add("--no-injection", dest="injected", action="store_false", help="the text alone")
    add("--epochs", type=int, default=1, metavar="N", help="over the same sequences (default 1)")
    add("--learning-rate", type=float, metavar="LR", help="peak (default: first of the profile)")
    add("--seed", type=int, help="of the generated world (default: first of the profile)")
    add("--cl-seed", type=int, help="of order and injection (default: first of the profile)")
    add("--save-every", type=int, metavar="STEPS", help="between states (default: the profile's)")
    add("--parallel", help="ddp or fsdp2 (default: as accelerate launch is configured, else ddp)")
    add("--recompute", action="store_true", default=None, help="activations, in the backward pass")
