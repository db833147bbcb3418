"""The plain text of manual pages, section by section, as far as their writers used man, mdoc, Pod and Tcl macros alike.

No typesetter: what is inside a conditional or a definition is left out (in these pages it is layout), unknown requests
are left out with their words, and unknown characters vanish.
"""

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

NAME_HEADING = re.compile("NAME|名称|名字|命令名")
TRANSLATORS = re.compile("跋|中文版|翻译计划")  # headings of what tells of the translation, the same in most pages
DESCRIPTION = re.compile(r"(?:\s[-–—]+|[-–—]+\s)\s*(.+)")
CHINESE = re.compile("[\u4e00-\u9fff]")

FONTS = {"B", "I", "R", "SB", "SM"}
ALTERNATING = {"BI", "BR", "IB", "IR", "RB", "RI"}
MDOC = re.findall(  # each may stand at the start of a line or among the words of another
    r"\w+",
    "Ad An Aq Ar At Bc Bo Bq Bx Cm D1 Dl Do Dq Dc Dv Em Er Ev Fa Fc Fd Fl Fn Fo Ft Fx Ic Li Nd Nm No Ns Nx Oc Oo Op Pa Pc "
    "Pf Po Pq Ql Qq Sq St Sx Sy Tn Ux Va Vt Xc Xo Xr",
)
TITLED = {"It", "SS", "Ss", "UR", "URL"}  # a new paragraph, begun by the words of the line
VERBATIM = {"nf", "Vb", "EX", "CS", "DS", "Bd"}
FILLED = {"fi", "Ve", "EE", "CE", "DE", "Ed"}
BREAKS = VERBATIM | FILLED | set(re.findall(r"\w+", "BE BS El LP P PP Pp RE RS Sp TP TQ HP bp br ce in sp ti"))

CHARACTERS = {"bu": "•", "lq": "“", "rq": "”", "em": "—", "en": "–", "co": "©", "rg": "®", "de": "°"}
CHARACTERS |= {"aq": "'", "dq": '"', "hy": "-", "bv": "|", "br": "|", "ul": "_", "ru": "_", "**": "*", "sl": "/"}
CHARACTERS |= {"rs": "\\", "ga": "`", "+-": "±", ">=": "≥", "<=": "≤"}
STRINGS = dict.fromkeys(('L"', 'R"', "lq", "rq", "Lq", "Rq"), '"')  # what macro packages and Pod define
STRINGS |= {"Aq": "'", "--": "-", "C+": "C++", "TX": "TeX", "PI": "pi"}
SINGLE = dict.fromkeys(" ~0t", " ") | {one: one for one in "\\-'`.\""} | {"e": "\\"}

NAME = r"(?:\((..)|\[([^\]\n]*)\]|(.))"
ESCAPE = re.compile(  # a string, a character, then what only sets fonts, sizes and places, then any other
    rf"\\(?:\*{NAME}|\((..)|\[([^\]\n]*)\]"
    r"|[fFmMngk](?:\(..|\[[^\]\n]*\]|.)|s[-+]?\d{1,2}|[hvwlLobDXZ]'[^'\n]*'|(.))"
)
WIDE = re.compile(r"[\u2e80-\uffef]")
LAYOUT = re.compile(r"\.\s*(if|ie|el|de|am|ig)\b\s*(.*)")


def chinese_pages(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(name, short description, body) of each page under `folder` whose description is in Chinese and whose body is not empty.

    The body is the page without its NAME section. Links to other pages are left out; a page of one `.so` has no NAME.
    """
    for path in sorted(folder.rglob("*.gz")):
        if path.is_symlink():
            continue
        page = sections(gzip.decompress(path.read_bytes()).decode("utf-8"))
        name = next((text for heading, text in page if NAME_HEADING.search(heading)), "")
        said = DESCRIPTION.search(name)
        rest = [s for s in page if s[1] and s[1] != name and not TRANSLATORS.search(s[0])]
        if said and CHINESE.search(said[1]) and rest:
            yield path.stem, said[1].strip(" .。"), "\n".join(line for section in rest for line in section if line)


def sections(source: str) -> list[tuple[str, str]]:
    """(heading, text) of each section of a page; the lines of a text are its paragraphs, list items and verbatim lines."""
    found: list[tuple[str, list[str]]] = [("", [""])]
    verbatim = False
    for request, words in _lines(source):
        paragraphs = found[-1][1]
        if request in ("SH", "Sh"):
            found.append((" ".join(words), [""]))
        elif request in BREAKS:
            verbatim = request in VERBATIM or (verbatim and request not in FILLED)
            paragraphs.append("")
        elif request in TITLED:
            paragraphs.append(" ".join(_spoken(words)))
        elif request == "IP":
            paragraphs.append(words[0] if words else "")
        elif request in ALTERNATING:
            paragraphs[-1] = _joined(paragraphs[-1], "".join(words))
        elif request in FONTS or request in MDOC:
            paragraphs[-1] = _joined(paragraphs[-1], " ".join(_spoken([request, *words]) if request in MDOC else words))
        elif request == "":
            text = words[0]
            paragraphs[-1] = _joined(paragraphs[-1], text)
            if verbatim or not text.strip():
                paragraphs.append("")
    return [(heading, _tidy(paragraphs)) for heading, paragraphs in found]


def _lines(source: str) -> Iterator[tuple[str, list[str]]]:
    """(request, its words) of each line, and ("", [text]); without comments, definitions, conditionals and table formats."""
    source = re.sub(r"(?<!\\)\\[\"#].*", "", source).replace("\\\n", "")
    depth, end, table_format = 0, "", False
    for line in source.split("\n"):
        line = re.sub(r"^'(?=\s*[A-Za-z]|$)", ".", line)  # the other control character
        layout = LAYOUT.match(line)
        if end:
            end = "" if re.match(rf"\.\s*{re.escape(end)}\s*$", line) else end
        elif depth or (layout and layout[1] in ("if", "ie", "el")):
            depth = max(0, depth + line.count("\\{") - line.count("\\}"))
        elif layout:
            names = layout[2].split()
            stop = names[:1] if layout[1] == "ig" else names[1:2]
            end = stop[0] if stop else "."
        elif line.startswith("."):
            request, *rest = line[1:].split(None, 1) or ["."]
            table_format = request in ("TS", "T&")
            yield request, [_plain(word) for word in _words(rest[0] if rest else "")]
        elif table_format:
            table_format = not line.rstrip().endswith(".")
        else:
            yield "", [_plain(re.sub(r"T[{}]|\t", " ", line))]


def _words(line: str) -> list[str]:
    """The arguments of a request: parted by spaces, unless in quotes; a quote in quotes is doubled."""
    found = re.findall(r'"((?:[^"]|"")*)"?|((?:\\ |\S)+)', line)
    return [quoted.replace('""', '"') or bare for quoted, bare in found]


def _spoken(words: list[str]) -> list[str]:
    """The words of an mdoc line without the macros among them; a flag has its dash, a description the one before it."""
    said, dash = [], ""
    for word in words:
        if word in MDOC:
            dash = {"Fl": "-", "Nd": "- "}.get(word, dash)
        else:
            said.append(dash + word)
            dash = ""
    return said if not dash else [*said, dash.strip()]


def _plain(text: str) -> str:
    return ESCAPE.sub(_character, text)


def _character(escape: re.Match[str]) -> str:
    string, name, single = escape[1] or escape[2] or escape[3], escape[4] or escape[5], escape[6]
    if string:
        return STRINGS.get(string, "")
    return CHARACTERS.get(name, "") if name else SINGLE.get(single, "")


def _joined(before: str, after: str) -> str:
    """Lines of one paragraph; Chinese goes on without a space."""
    tight = before and after and WIDE.match(before[-1]) and WIDE.match(after[0])
    return before + ("" if tight or not before else " ") + after


def _tidy(paragraphs: list[str]) -> str:
    lines = (" ".join(paragraph.split()) for paragraph in paragraphs)
    return "\n".join(line for line in lines if line)
