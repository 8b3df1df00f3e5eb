"""deepstream's YAML and JSON files, with ``${NAME}``, ``file()`` and ``fileLoad()``.

deepstream replaces ``${NAME}`` in the text before it parses the YAML, so a value with a quote or a
``#`` in it breaks the file. Here the text is parsed first, into nodes that know their style and
source text. Only the nodes that are read are then replaced and typed: an unset variable of another
section doesn't matter.

Parsing first would break ``{host: ${HOST}, port: ${PORT}}``, as YAML takes these braces for its
own. So every character with a meaning to YAML inside ``${...}`` is exchanged, before parsing, for
a character that the text doesn't contain. Lines and columns stay the same, and
``"\\x24{NAME}"`` writes a literal ``${NAME}``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial, wraps
from itertools import islice
from typing import Any, TypeVar, cast

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from . import files
from .validation import Location, Scalar, is_null

SUFFIXES = (".yml", ".yaml", ".json")

_PLACEHOLDER = re.compile(r"\$\{[^}\n]+\}")
_STRUCTURAL = "{},[]:#"
# Characters for private use, which a configuration hardly ever contains.
_SPARE = range(0x100000, 0x10FFFE)
_CALL = re.compile(r"(file|fileLoad)\((.+)\)", re.DOTALL)
_QUOTE = re.compile(r"""\s*(?:'([^']*)'|"([^"]*)")""")

_UNDER_WAY = object()
_Build = TypeVar("_Build", bound=Callable[..., Any])

_MAP, _SEQ, _STR = (f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str"))
_TYPED_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float")}
_PLAIN = ""

# Words and numbers of YAML 1.2, as js-yaml reads them: yes, no, on and off are text.
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_DECIMAL = re.compile(r"[-+]?[0-9]{1,100}")
_BASED = re.compile(r"[-+]?0(x[0-9a-fA-F]{1,32}|o[0-7]{1,32}|b[01]{1,64})")
_FLOAT = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, used to compose nodes, never to construct objects.

    An unquoted scalar without a tag of its own gets an empty tag, so that it is typed after
    substitution.
    """

    def compose_scalar_node(self, anchor: dict[str, Node]) -> ScalarNode:
        event = self.peek_event()  # type: ignore[no-untyped-call]  # types-PyYAML has no types here
        node = super().compose_scalar_node(anchor)
        if event.tag == "!":
            node.tag = _STR
        elif event.implicit[0]:
            node.tag = _PLAIN
        return node


class Tree:
    """A configuration of sections: a mapping that a program passed, taken as it is."""

    def __init__(self, root: object, place: Location, folder: str) -> None:
        self.root = root
        self.place = place
        self.folder = folder  # start of relative paths

    def keys(self, node: object, place: Location | None = None) -> Mapping[str, object] | None:
        """Return the child nodes of a mapping by their names, or None for any other node.

        ``place`` is that of the node, by default the root's.
        """
        return node if isinstance(node, Mapping) else None

    def is_empty(self, node: object) -> bool:
        """Return whether a node is a name without a value."""
        return is_null(node)

    def value(self, node: object, place: Location) -> object:
        """Return the evaluated content of a node. Raises ConfigError."""
        return node


def _once(build: _Build) -> _Build:
    """Let a method of Document run once a node, however often aliases use the node.

    Without that, aliases of aliases would grow without bound.
    """

    @wraps(build)
    def built(self: Document, node: Node, place: Location, *options: bool) -> object:
        key = (build, id(node), *options)
        if key not in self.built:
            self.built[key] = _UNDER_WAY
            self.built[key] = build(self, node, place, *options)
        elif self.built[key] is _UNDER_WAY:
            raise place.error("contains itself, through an alias")
        return self.built[key]

    return cast(_Build, built)


class Document(Tree):
    """One YAML or JSON file; a node is replaced and typed when it is read."""

    def __init__(
        self, path: str, environ: Mapping[str, str], place: Location, *, loaded: bool = False
    ):
        """Parse the file; ``loaded`` is for a file that ``fileLoad()`` names.

        Raises ConfigError if it can't be read or isn't valid YAML or JSON.
        """
        self._environ = environ
        self._loaded = loaded
        self.built: dict[object, object] = {}
        source = read_text(path, place)
        unused = (char for char in map(chr, _SPARE) if char not in source)
        spare = "".join(islice(unused, len(_STRUCTURAL)))
        self._mask = str.maketrans(_STRUCTURAL, spare)
        self._unmask = str.maketrans(spare, _STRUCTURAL)
        opening, closing = (brace.translate(self._mask) for brace in "{}")
        self._masked = re.compile(rf"\${opening}([^{closing}]+){closing}")
        masked = _PLACEHOLDER.sub(lambda found: found[0].translate(self._mask), source)
        root = _parse(masked, place, is_json=path.lower().endswith(".json"))
        super().__init__(root, place, os.path.dirname(os.path.abspath(path)))

    def keys(self, node: object, place: Location | None = None) -> dict[str, Node] | None:
        """Return the entries of a mapping, before substitution, or None for any other node.

        Raises ConfigError for a duplicate key.
        """
        if not isinstance(node, MappingNode):
            return None
        return self._entries(node, place or self.place, False)

    def is_empty(self, node: object) -> bool:
        return isinstance(node, ScalarNode) and not node.value

    def value(self, node: object, place: Location) -> object:
        """Return a node's content, replaced and typed: dicts, lists, text, Scalars and None.

        Raises ConfigError for an unset variable, a missing file, a duplicate key, a tag, and an
        alias that contains itself.
        """
        assert isinstance(node, Node)
        try:
            return self._value(node, place)
        except RecursionError:
            raise place.error("is nested too deeply") from None

    @_once
    def _value(self, node: Node, place: Location) -> object:
        if isinstance(node, MappingNode):
            entries = self._entries(node, place, True)
            return {key: self._value(item, place.at(key)) for key, item in entries.items()}
        if isinstance(node, SequenceNode):
            _refuse_tag(node, place, _SEQ)
            return [self._value(item, place.item(i)) for i, item in enumerate(node.value)]
        return self._scalar(node, place)

    @_once
    def _entries(self, node: MappingNode, place: Location, substituted: bool) -> dict[str, Node]:
        """Return the entries of a mapping, including the ones merged by ``<<``."""
        _refuse_tag(node, place, _MAP)
        entries: dict[str, Node] = {}
        first: dict[str, Node] = {}
        bases: list[Node] = []
        for key_node, item in node.value:
            if not isinstance(key_node, ScalarNode):
                raise place.error("the name of an option must be text")
            if key_node.tag == _PLAIN and key_node.value == "<<":
                bases += item.value if isinstance(item, SequenceNode) else [item]
                continue
            key = key_node.value.translate(self._unmask)
            if substituted:
                key = self._substitute(key_node.value, place)
            if key in entries:
                raise place.at(key).error(f"is given twice{_lines(first[key], key_node)}; keep one")
            entries[key] = item
            first[key] = key_node
        for base in bases:
            if not isinstance(base, MappingNode):
                raise place.error("<< must be followed by a mapping or a list of them")
            # The mapping's own entries win, then the earlier of the merged ones.
            entries = {**self._entries(base, place, substituted), **entries}
        return entries

    def _scalar(self, node: Node, place: Location) -> object:
        assert isinstance(node, ScalarNode)
        written: str = node.value
        plain = node.tag == _PLAIN or node.tag in _TYPED_TAGS
        if not plain:
            _refuse_tag(node, place, _STR)
        if not self._loaded and (call := _CALL.fullmatch(written)):
            return self._call(call[1], self._substitute(call[2], place), place)
        value = self._substitute(written, place)
        if not plain:
            return value
        typed = _typed(value)
        # The text of an empty variable isn't the null that an empty scalar is, nor one that the
        # file itself defaults to by ${NAME:-}.
        if value == "" != written and ":-".translate(self._mask) not in written:
            return Scalar(None, "")
        if isinstance(typed, str) or (typed is None and (value == "" or value == written)):
            return typed
        return Scalar(typed, value)

    def _call(self, function: str, path: str, place: Location) -> object:
        path = os.path.normpath(os.path.join(self.folder, path.strip()))
        if function == "file":
            return path
        here = Location(f"{place}: {os.path.basename(path)}")
        if not path.lower().endswith(SUFFIXES):
            return read_text(path, here)
        document = Document(path, self._environ, here, loaded=True)
        return document.value(document.root, here)

    def _substitute(self, written: str, place: Location) -> str:
        def replaced(found: re.Match[str]) -> str:
            name, has_default, default = found[1].translate(self._unmask).partition(":-")
            value = self._environ.get(name)
            if not value and has_default:
                return default
            if value is not None:
                return value
            if re.fullmatch(r"[A-Za-z_]\w{0,79}", name):
                raise place.error(
                    f"the environment variable {name} is not set; "
                    f"set it, or write a default as in ${{{name}:-default}}"
                )
            raise place.error(
                "${...} must contain the name of an environment variable; in double quotes, "
                '"\\x24{" writes a plain ${'
            )

        return self._masked.sub(replaced, written)


def read_text(path: str, place: Location) -> str:
    """Return the text of a UTF-8 file. Raises ConfigError if it is missing or too large."""
    try:
        return files.read(path, files.MAX_CONFIG_BYTES).decode("utf-8-sig")
    except files.UnsuitableFile as error:
        problem = f"{path} {error}"
    except FileNotFoundError:
        problem = f"there is no file {path}"
        if not os.path.isabs(path):
            with suppress(OSError):
                problem += f" in {os.getcwd()}"
    except UnicodeDecodeError as error:
        problem = f"{path} isn't UTF-8 text (byte {error.start}); save it as UTF-8"
    except (OSError, ValueError) as error:
        problem = f"{path} can't be read: {getattr(error, 'strerror', None) or error}"
    raise place.error(problem)


def _parse(text: str, place: Location, *, is_json: bool) -> Node:
    """Return the root node; an empty YAML file is null.

    The ConfigError has no cause, because the parser's error quotes the line, secrets included.
    """
    try:
        if is_json:
            return _json_root(text)
        return yaml.compose(text, Loader=_Loader) or ScalarNode(_PLAIN, "")
    except json.JSONDecodeError as error:
        line, column, problem = error.lineno, error.colno, error.msg
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        problem = "a character that YAML doesn't allow"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        assert mark is not None
        line, column, problem = mark.line + 1, mark.column + 1, error.problem or ""
    except RecursionError:
        raise place.error("is nested too deeply") from None
    raise place.error(
        f"line {line}, column {column}: not valid {'JSON' if is_json else 'YAML'}: "
        f"{_without_quotes(problem)}; {_remedy(text, line, column, problem, is_json)}"
    )


def _remedy(text: str, line: int, column: int, problem: str, is_json: bool) -> str:
    """Return what to do about text that isn't YAML or JSON, by the characters at its place."""
    written = text.splitlines()[line - 1 : line]
    there = written[0][column - 1 :] if written else ""
    if not text.strip():
        return "it is empty"
    if is_json and (there.startswith(("//", "/*", "#"))):
        return "JSON has no comments: remove them, or name the file .yml and begin them with #"
    # From Python 3.13 on, the place is that of the comma.
    if is_json and (there.startswith(("}", "]")) or "trailing comma" in problem):
        return "remove the comma before it"
    if not is_json and there.startswith("\t"):
        return "indent by spaces, not by tabs"
    if "another document" in problem:
        return "keep one of the documents that --- separates"
    return "put text with special characters in quotes"


def _without_quotes(problem: str) -> str:
    """Return a parser's error text without its quotations from the file.

    A quotation may be a piece of a password, such as one that begins with * & or !. Names of
    tokens and single punctuation characters are kept.
    """

    def shown(found: re.Match[str]) -> str:
        quoted = found[1] or found[2] or ""
        is_harmless = quoted.startswith("<") or (len(quoted) == 1 and not quoted.isalnum())
        return found[0] if is_harmless else ""

    return _QUOTE.sub(shown, problem)


def _json_root(text: str) -> Node:
    def refuse(word: str) -> None:
        raise json.JSONDecodeError(f"{word} isn't JSON", text, text.index(word))

    def node(value: object) -> Node:
        if isinstance(value, Node):
            return value
        if isinstance(value, list):
            return SequenceNode(_SEQ, [node(item) for item in value])
        if isinstance(value, str):
            return ScalarNode(_STR, value)
        return ScalarNode(_PLAIN, json.dumps(value))

    def mapping(pairs: list[tuple[str, object]]) -> Node:
        return MappingNode(_MAP, [(node(key), node(item)) for key, item in pairs])

    number = partial(ScalarNode, _PLAIN)
    return node(
        json.loads(
            text,
            object_pairs_hook=mapping,
            parse_int=number,
            parse_float=number,
            parse_constant=refuse,
        )
    )


def _typed(text: str) -> bool | int | float | str | None:
    """Return the value of an unquoted text in YAML."""
    if text in _WORDS:
        return _WORDS[text]
    if _DECIMAL.fullmatch(text):
        return int(text)
    if _BASED.fullmatch(text):
        return int(text, base=0)
    return float(text) if _FLOAT.fullmatch(text) else text


def _refuse_tag(node: Node, place: Location, allowed: str) -> None:
    if node.tag != allowed:
        raise place.error("a YAML tag has no meaning here; put text that begins with ! into quotes")


def _lines(*nodes: Node) -> str:
    lines = [node.start_mark.line + 1 for node in nodes if node.start_mark]
    return f" (lines {lines[0]} and {lines[1]})" if lines else ""
