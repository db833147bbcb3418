"""Command-line options made from frozen dataclasses: an option is declared once, as a field with its help.

A field's name gives the option's name, its type the values, its default the default. `Literal` becomes a choice, `tuple[str, ...]`
a list by commas (with `many` a repeated option, with `rest` the words after --), `bool` a flag. A field whose type is a dataclass
is a group: its fields are options of the command like any other, so configs are composed of groups and no option is declared twice.
"""

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import click

from ..errors import ShoalError

C = TypeVar("C")


def option(help: str, default: Any = MISSING, **limits: Any) -> Any:
    """A dataclass field that is an option. limits: `min` of a number, `many`, `rest`. Without a default it is required."""
    return field(default=default, metadata={"help": help, **limits})


def group(kind: type[C]) -> C:
    """A dataclass field that is a group of options, all of which have defaults."""
    return field(default_factory=kind)


def configure(config: type[C], **values: Any) -> C:
    """The config with these options, by their flat names: `configure(EmbedConfig, input="docs/", output="vectors/")`.

    Raises TypeError for a name that is no option of the config, or a required one that is missing.
    """
    if rest := values.keys() - {each.name for each, _ in _declared(config)}:
        raise TypeError(f"{config.__name__} has no option {', '.join(sorted(rest))}")
    return _compose(config, values)


def flat(config: Any) -> dict[str, Any]:
    """The options of a config by their flat names: `configure(type(config), **flat(config))` is the config again."""
    values: dict[str, Any] = {}
    for each in fields(config):
        value = getattr(config, each.name)
        values |= flat(value) if is_dataclass(value) else {each.name: value}
    return values


def _compose(config: type[C], values: Mapping[str, Any]) -> C:
    hints, arguments = get_type_hints(config), {}
    for each in fields(config):  # type: ignore[arg-type]
        if is_dataclass(hints[each.name]):
            arguments[each.name] = _compose(hints[each.name], values)
        elif each.name in values:
            arguments[each.name] = values[each.name]
    return config(**arguments)


def _declared(config: Any) -> list[tuple[Field, Any]]:
    """The options of a config and of its groups, in order of declaration, with their types."""
    hints, options = get_type_hints(config), []
    for each in fields(config):
        hint = hints[each.name]
        options += _declared(hint) if is_dataclass(hint) else [(each, hint)]
    return options


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
            show_messages()
            try:
                context.exit(run(configure(config, **values)))
            except ShoalError as error:
                click.echo(f"error: {error}", err=True)
                context.exit(error.exit_code)

        required_first = sorted(_declared(config), key=lambda pair: pair[0].default is not MISSING)
        params = [_option(field, hint) for field, hint in required_first]
        settings = {"max_content_width": 110, "help_option_names": ["-h", "--help"]}
        texts: Any = {"help": run.__doc__, "epilog": epilog}
        return click.Command(
            name, callback=main, params=params, no_args_is_help=True, context_settings=settings, **texts
        )

    return decorate


class _Stderr(logging.Handler):
    """Writes the driver's messages to the standard error of the moment, one sentence a line."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)  # click.echo goes round the live line to the terminal itself


def show_messages() -> None:
    """Let the logger `shoal` speak on standard error. Only the driver calls this: workers are silent."""
    logger = logging.getLogger("shoal")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        logger.addHandler(_Stderr())


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
    return click.IntRange(min=field.metadata["min"]) if hint is int and "min" in field.metadata else hint
