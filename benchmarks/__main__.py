"""python -m benchmarks kernels --codegen      what the compiler makes of every kernel, for chips that are not here."""

import argparse
import sys
from pathlib import Path

from benchmarks import codegen

RESULTS = Path(__file__).with_name("results")


def kernels(arguments: argparse.Namespace) -> int:
    return codegen.run(arguments.arch or codegen.ARCHITECTURES, arguments.out, quick=arguments.quick)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measurements, written as JSON and printed."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("kernels", help="the Triton kernels")
    command.add_argument(
        "--codegen", action="store_true", required=True, help="compile every shipped configuration; needs no GPU"
    )
    command.add_argument(
        "--arch",
        action="append",
        choices=codegen.ARCHITECTURES,
        help=f"one chip, may be repeated (default: {', '.join(codegen.ARCHITECTURES)})",
    )
    command.add_argument("--quick", action="store_true", help="one configuration of each kernel")
    command.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where the JSON goes")
    command.set_defaults(function=kernels)
    arguments = parser.parse_args(argv)
    return arguments.function(arguments)


if __name__ == "__main__":
    sys.exit(main())
