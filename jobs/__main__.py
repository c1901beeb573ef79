"""Learns the landmarks of a kind of object from unlabelled images, and finds them on others."""

import ast
import difflib
import importlib
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Union

VERBS = ("demo", "pack", "train", "evaluate", "predict", "name", "export", "tune", "compare", "validate",
         "import-checkpoint")  # fmt: skip
"""In the order in which people need them; each is the module of that name."""

COMPLETION = ("--tyro-print-completion", "--tyro-write-completion")


def module_of(verb: str) -> str:
    """The verb's module."""
    return f"jobs.{verb.replace('-', '_')}"


def summary(verb: str) -> str:
    """First line of the module's docstring, read without importing it: that would take seconds."""
    spec = find_spec(module_of(verb))
    assert spec is not None and spec.origin is not None, verb
    return (ast.get_docstring(ast.parse(Path(spec.origin).read_text())) or "").partition("\n")[0]


def help_page(prog: str) -> str:
    """All verbs, with a line for each."""
    rows = "\n".join(f"  {verb:<18} {summary(verb)}" for verb in VERBS)
    return (
        f"usage: {prog} VERB ...\n\n{__doc__}\n\n{rows}\n\n{prog} VERB --help shows the options of a verb.\n"
        f"landmarks {COMPLETION[0]} bash (or zsh, tcsh) prints completions for your shell."
    )


def print_completion(arguments: Sequence[str]) -> None:
    """Prints or writes what a shell needs to complete verbs and their options."""
    import tyro

    commands = []
    for verb in VERBS:
        as_verb = tyro.conf.subcommand(verb, description=summary(verb))
        commands.append(Annotated[importlib.import_module(module_of(verb)).COMMAND, as_verb])
    either: Any = Union[tuple(commands)]  # noqa: UP007 (made of a list)
    tyro.cli(either, prog="landmarks", args=arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the verb that is named first; exits with code 2 if there is no such verb."""
    prog = "python -m jobs" if Path(sys.argv[0]).name == "__main__.py" else "landmarks"
    verb, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    if verb in ("-h", "--help"):
        print(help_page(prog))
    elif verb in COMPLETION:
        print_completion([verb, *rest])
    elif verb in VERBS:
        importlib.import_module(module_of(verb)).main(rest, prog=f"{prog} {verb}")
    else:
        nearest = difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.0)[0]
        unknown = f"error: no verb {verb!r}; did you mean {nearest}? {prog} --help lists them all"
        print(unknown if verb else help_page(prog), file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
