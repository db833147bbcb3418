"""Write the option tables of the pages of this folder from the options of the jobs: python docs/options.py

A page has a table between the lines `<!-- options: jobs/NAME.py -->` and `<!-- end -->`. With --check nothing is written:
the program ends with exit code 1 and names the pages whose tables differ from the code.
"""

import re
import runpy
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
TABLE = re.compile(r"<!-- options: (jobs/\w+\.py) -->\n.*?<!-- end -->", re.DOTALL)


def pages() -> list[Path]:
    """The pages that have a table."""
    return [page for page in sorted((ROOT / "docs").rglob("*.md")) if TABLE.search(page.read_text())]


def with_tables(text: str) -> str:
    """The text of a page, its tables made anew."""
    return TABLE.sub(lambda found: f"<!-- options: {found[1]} -->\n{table(found[1])}\n<!-- end -->", text)


def table(job: str) -> str:
    """A Markdown table of the options of a job."""
    command = runpy.run_path(str(ROOT / job))["main"]
    rows = ["| option | value | default | |", "|---|---|---|---|"]
    return "\n".join(rows + [_row(option) for option in command.params if isinstance(option, click.Option)])


def _row(option: click.Option) -> str:
    default = "required" if option.required else _default(option)
    return f"| `{option.opts[0]}` | {_value(option)} | {default} | {(option.help or '').replace('|', '&#124;')} |"


def _default(option: click.Option) -> str:
    value = option.default
    if option.is_flag or not isinstance(value, str | int | float) or value == "":
        return ""
    return f"`{value:,}`" if isinstance(value, int) and value >= 10_000 else f"`{value}`"


def _value(option: click.Option) -> str:
    if option.is_flag:
        return ""
    if isinstance(option.type, click.Choice):
        return ", ".join(f"`{choice}`" for choice in option.type.choices)
    name = {"integer range": "integer", "float range": "number", "float": "number"}.get(
        option.type.name, option.type.name
    )
    return f"{name.lower()}, repeated" if option.multiple else name.lower()


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; name the pages that differ.")
def main(check: bool) -> None:
    """Make the tables of options in docs/ anew."""
    stale = [page for page in pages() if with_tables(page.read_text()) != page.read_text()]
    for page in stale:
        click.echo(f"{page.relative_to(ROOT)} {'differs from the code: run make docs' if check else 'written'}")
        if not check:
            page.write_text(with_tables(page.read_text()))
    if check and stale:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
