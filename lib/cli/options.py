"""Command-line options made from a frozen dataclass: an option is declared once, as a field with its help.

A field's name gives the option's name, its type the values, its default the default, `metadata["help"]` the help.
`Literal` becomes a choice, `tuple[str, ...]` a list by commas (with `metadata["many"]` a repeated option, with
`metadata["rest"]` the words after --), `bool` a flag.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import click

from ..errors import ShoalError, UsageError

C = TypeVar("C")


class Words(click.ParamType):
    """`a,b` as ("a", "b")."""

    name = "NAMES"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> tuple[str, ...]:
        return value if isinstance(value, tuple) else tuple(word.strip() for word in value.split(",") if word.strip())


def command(config: type[C], name: str, epilog: str) -> Callable[[Callable[[C], int]], click.Command]:
    """Decorate `run(config) -> exit code` into a click command with the options of `config`.

    A ShoalError is printed as one sentence and gives its exit code; called with no option, the command explains itself.
    """

    def decorate(run: Callable[[C], int]) -> click.Command:
        @click.pass_context
        def main(context: click.Context, **values: Any) -> None:
            _show_messages()
            try:
                context.exit(run(config(**values)))
            except ShoalError as error:
                click.echo(f"error: {error}", err=True)
                context.exit(error.exit_code)

        settings = {"max_content_width": 110, "help_option_names": ["-h", "--help"]}
        return click.Command(
            name,
            callback=main,
            params=[_option(field, hint) for field, hint in _fields(config)],
            help=run.__doc__,
            epilog=epilog,
            no_args_is_help=True,
            context_settings=settings,
        )

    return decorate


class _Stderr(logging.Handler):
    """Writes the driver's messages to the standard error of the moment, one sentence a line."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)  # click.echo goes round the live line to the terminal itself


def _show_messages() -> None:
    """Let the logger `shoal` speak on standard error. Only the driver calls this: workers are silent."""
    logger = logging.getLogger("shoal")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        logger.addHandler(_Stderr())


def _fields(config: type) -> list[tuple[Field, Any]]:
    """Required fields first, then in order of declaration."""
    hints = get_type_hints(config)
    found = sorted(fields(config), key=lambda field: field.default is not MISSING)
    return [(field, hints[field.name]) for field in found]


def _option(field: Field, hint: Any) -> click.Parameter:
    if field.metadata.get("rest"):
        return click.Argument([field.name], nargs=-1, required=True, metavar=f"-- {field.name.upper()}...")
    name = "--" + field.name.replace("_", "-")
    required = field.default is MISSING
    extra: dict[str, Any] = {"help": field.metadata["help"], "required": required}
    if not required:
        extra |= {"default": field.default, "show_default": field.default not in (None, (), False)}
    if hint is bool:
        return click.Option([name], is_flag=True, **extra)
    if field.metadata.get("many"):
        return click.Option([name], multiple=True, **extra)
    return click.Option([name], type=_type(field, hint), **extra)


def _type(field: Field, hint: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):
        hint = next(part for part in get_args(hint) if part is not NoneType)
    if get_origin(hint) is Literal:
        return click.Choice(get_args(hint))
    if get_origin(hint) is tuple:
        return Words()
    if hint is int and "min" in field.metadata:
        return click.IntRange(min=field.metadata["min"])
    if hint not in (str, int, float):
        raise UsageError(f"no option type for {field.name}: {hint}")
    return hint
