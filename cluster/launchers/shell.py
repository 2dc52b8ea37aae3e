"""The shell commands of a launcher's configuration, read without being run."""

import shlex
import subprocess
from collections.abc import Iterator
from typing import Any

import click
from ray.scripts import scripts


def check_syntax(command: str) -> str:
    """What bash says against a command; "" where it can be run."""
    # -n reads and runs nothing.
    read = subprocess.run(
        ["bash", "-n", "-c", command], capture_output=True, text=True, check=False
    )
    return read.stderr.strip().partition("\n")[0]


def read_ray_commands(command: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(subcommand, its options) of each call of `ray`, as Ray's own command line reads them.

    Raises:
        ValueError: Ray knows no such subcommand or option, or not with this value.
    """
    for words in _split_calls(command):
        if words[0] != "ray":
            continue
        name = words[1] if len(words) > 1 else ""
        subcommand = scripts.cli.commands.get(name)
        if subcommand is None:
            raise ValueError(f"Ray has no command {name!r}")
        try:
            context = subcommand.make_context(f"ray {name}", words[2:])
        except click.ClickException as error:
            raise ValueError(f"ray {name}: {error.format_message()}") from error
        yield name, context.params


def _split_calls(command: str) -> Iterator[list[str]]:
    """Words of each simple command in a list of them."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in lexer:
        if set(word) <= set(";&|(){}"):
            if words:
                yield words
            words = []
        else:
            words.append(word)
    if words:
        yield words
