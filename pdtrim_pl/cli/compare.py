"""`pdtrim compare`: reads settings from YAML and overrides, makes every row, and writes tables and pictures."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from rich.console import Console

from pdtrim_pl.cli.parsing import OneLineErrors
from pdtrim_pl.compare.comparison import Comparison, Results
from pdtrim_pl.compare.pictures import draw
from pdtrim_pl.compare.tables import facts_of, print_table, to_markdown, write_accuracy_csv, write_csv
from pdtrim_pl.plan.json_files import write_whole


def run(args: Sequence[str]) -> int:
    """Run the comparison that `args` describe, and print the table."""
    comparison, settings = parse(args)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # it repeats the same lines for every training
    folder, name = comparison.output.folder, comparison.output.name

    facts = facts_of(settings, shlex.join(["pdtrim", "compare", *args]), comparison.model.device)

    def write(results: Results) -> None:
        write_csv(results.outcomes, folder / f"{name}.csv")
        if results.accuracy:
            write_accuracy_csv(results.accuracy, folder / f"{name}_accuracy.csv")
        write_whole(folder / f"{name}.md", f"# {name}\n\n{to_markdown(results.outcomes, results.accuracy, facts)}")

    results = comparison.run(settings, write)
    draw(results.outcomes, folder, name)
    print_table(results.outcomes, Console())
    print(f"Tables, pictures and plans: {folder}")
    return 0


def parse(args: Sequence[str]) -> tuple[Comparison, dict[str, Any]]:
    """The comparison and its resolved settings. Unknown keys end the program with a message."""
    parser = _parser()
    options = parser.parse_args(list(args))
    if options.quick:
        options = parser.parse_args(_with_quick(args, options.quick_settings))
    settings = yaml.safe_load(parser.dump(options, skip_unset=False))
    built = parser.instantiate(options)
    comparison = Comparison(
        built.model, built.data, built.methods, built.rows, built.training, built.measures, built.output
    )
    return comparison, settings


def _parser() -> OneLineErrors:
    parser = OneLineErrors(
        prog="pdtrim compare",
        description="The same model, text and removal counts through several methods.",
        parser_mode="omegaconf",
    )
    parser.add_argument("--config", action="config", help="YAML with the settings below")
    parser.add_argument("--quick", action="store_true", help="apply `quick_settings`")
    parser.add_argument(
        "--quick_settings", type=dict[str, Any], default={}, help="dotted settings of a small version and their values"
    )
    parser.add_class_arguments(Comparison, None)
    return parser


def _with_quick(args: Sequence[str], quick: Mapping[str, Any]) -> list[str]:
    """The arguments with `quick_settings` after the configuration file, so that the user's own still win."""
    at = max((i for i, arg in enumerate(args) if arg.startswith("--config")), default=-1)
    after = at + 1 + (at >= 0 and args[at] == "--config")
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in quick.items()}
    overrides = [f"--{name}={text}" for name, text in texts.items()]
    return [*args[:after], *overrides, *args[after:]]
