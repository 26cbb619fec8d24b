"""python -m benchmarks COMMAND: measurements, written as JSON under benchmarks/results/<device>/ and printed.

kernels      every Triton kernel against its peers; --codegen: what the compiler makes of them, for chips not here
tune         finds the launch choices of this GPU and rewrites kernels/tuned/
generation   tokens a second with and without KV cache, beside Transformers
tokenizer    compression and speed of the tokenizer
training     steps of pretraining beside Transformers and nanoGPT
learning     what each lever of the speed recipe gains; how soon it gets where nanoGPT gets
finetuning   every method of finetuning beside training from scratch, on sentences in three classes
tasks        the default run of each task: its time, and what it beats
unbalanced   what helps a rare class: weights, balanced batches, a tuned threshold
forgetting   the old task's loss before and after a finetuning, and what keeps it
tables       writes the README's tables anew from the results
"""

import argparse
import sys
from pathlib import Path

from benchmarks import codegen
from benchmarks.records import RESULTS, ROOT


def kernels(arguments: argparse.Namespace) -> int:
    if arguments.codegen:
        return codegen.run(arguments.arch or codegen.ARCHITECTURES, arguments.out, quick=arguments.quick)
    import os

    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # counts only before triton is imported, as the next line does
    from benchmarks import kernels

    return kernels.run(arguments.family or (), arguments.out, quick=arguments.quick)


def tune(arguments: argparse.Namespace) -> int:
    from benchmarks import tune

    return tune.run(arguments.family or (), arguments.out, quick=arguments.quick)


def generation(arguments: argparse.Namespace) -> int:
    from benchmarks import generation

    return generation.run(arguments.model or (), arguments.out, quick=arguments.quick)


def tokenizer(arguments: argparse.Namespace) -> int:
    from benchmarks import tokenizer

    return tokenizer.run(arguments.out, quick=arguments.quick)


def training(arguments: argparse.Namespace) -> int:
    from benchmarks import training

    return training.run(arguments.model or (), arguments.nanogpt, arguments.out, quick=arguments.quick)


def learning(arguments: argparse.Namespace) -> int:
    from benchmarks import learning

    given = arguments.part or learning.PARTS
    return learning.run(
        arguments.text, arguments.nanogpt, given, arguments.seeds, arguments.work, arguments.out, quick=arguments.quick
    )


def finetuning(arguments: argparse.Namespace) -> int:
    from benchmarks import finetuning

    return finetuning.run(arguments.data, arguments.work, arguments.out, quick=arguments.quick)


def tasks(arguments: argparse.Namespace) -> int:
    from benchmarks import tasks

    bases = {"mlm-tiny": arguments.encoder, "default": arguments.decoder}
    given = {preset: folder for preset, folder in bases.items() if folder is not None}
    return tasks.run(arguments.task or [], given, arguments.work, arguments.out, quick=arguments.quick)


def unbalanced(arguments: argparse.Namespace) -> int:
    from benchmarks import unbalanced

    return unbalanced.run(arguments.seeds, arguments.work, arguments.out, quick=arguments.quick)


def forgetting(arguments: argparse.Namespace) -> int:
    from benchmarks import forgetting

    return forgetting.run(arguments.work, arguments.out, quick=arguments.quick)


def tables(arguments: argparse.Namespace) -> int:
    from benchmarks import tables

    return tables.run(arguments.readme, arguments.out, check=arguments.check)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(function, help: str, *, quick: str | None, work: bool = False) -> argparse.ArgumentParser:
        added = commands.add_parser(function.__name__, help=help)
        added.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="the results' folder")
        if quick:
            added.add_argument("--quick", action="store_true", help=quick)
        if work:
            runs = f"runs/{function.__name__}"
            added.add_argument("--work", type=Path, default=ROOT / runs, metavar="DIR", help=f"its runs ({runs})")
        added.set_defaults(function=function)
        return added

    added = command(kernels, "the Triton kernels", quick="few shapes; with --codegen one configuration of each kernel")
    added.add_argument("--family", action="append", metavar="F", help="one family, may be repeated (default: all)")
    added.add_argument("--codegen", action="store_true", help="only compile every shipped configuration; needs no GPU")
    added.add_argument(
        "--arch",
        action="append",
        choices=codegen.ARCHITECTURES,
        help=f"with --codegen: one chip, may be repeated (default: {', '.join(codegen.ARCHITECTURES)})",
    )
    added = command(tune, "launch choices for this GPU", quick="few candidates, common shapes")
    added.add_argument("--family", action="append", metavar="F", help="one tuned table, may be repeated (default: all)")
    added = command(generation, "tokens a second", quick="a tiny model, few tokens")
    added.add_argument(
        "--model", action="append", metavar="MODEL", help="a preset or a MODEL folder, may be repeated (gpt2, llama-5m)"
    )
    command(tokenizer, "compression, MB a second", quick="a small part of the corpus")
    added = command(training, "steps of pretraining", quick="a tiny model, few steps")
    added.add_argument(
        "--model", action="append", metavar="NAME", help="one case, may be repeated (default: the device's)"
    )
    added.add_argument("--nanogpt", type=Path, metavar="DIR", help="an unmodified checkout, as another peer")
    added = command(learning, "loss against tokens, seconds and FLOPs", quick="a few steps of each", work=True)
    added.add_argument("--text", type=Path, metavar="FILE", help="tiny Shakespeare (default: nanoGPT's input.txt)")
    added.add_argument("--nanogpt", type=Path, metavar="PATH", help="a checkout of nanoGPT to train beside ours")
    parts = "peer, short, equal, long, default, plain, ladder, without, width"
    added.add_argument("--part", action="append", metavar="P", help=f"may be repeated (default: {parts})")
    added.add_argument("--seeds", type=int, default=2, metavar="N", help="runs of each rung of the ladder (2)")
    added = command(finetuning, "methods of finetuning", quick="two steps of each", work=True)
    added.add_argument("--data", type=Path, required=True, metavar="DIR", help="the folder of sst3-*.jsonl")
    added = command(tasks, "the default run of each task", quick="two steps of each", work=True)
    added.add_argument("--task", action="append", metavar="T", help="one task, may be repeated (default: all)")
    added.add_argument("--encoder", type=Path, metavar="RUN", help="a run of mlm-tiny (default: pretrains one)")
    added.add_argument("--decoder", type=Path, metavar="RUN", help="a run of default (default: pretrains one)")
    added = command(unbalanced, "what helps a rare class", quick="two steps of each", work=True)
    added.add_argument("--seeds", type=int, default=1, metavar="N", help="times that all folds are run (1)")
    command(forgetting, "what keeps the old task", quick="two steps of each", work=True)
    added = command(tables, "the README's tables", quick=None)
    added.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE", help="the file to rewrite")
    added.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is out of date")
    return top


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        return arguments.function(arguments)
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
