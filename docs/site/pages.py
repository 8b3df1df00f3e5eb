"""The hooks of mkdocs: pages from outside docs/, their links, and the reference of options."""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

HERE = Path(__file__).parent
PROJECT = HERE.parent.parent
# The package is built in place and need not be installed.
sys.path[:0] = [str(PROJECT), str(HERE)]

import dscache  # noqa: E402
from option_reference import reference  # noqa: E402

# Files outside docs/, and their names on the site.
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "LICENSE": "LICENSE.txt",
    "bench/README.md": "bench.md",
    "examples/deepstream/README.md": "sharing.md",
    "examples/deepstream/config.yml": "deepstream-config.yml",
    "examples/operations/README.md": "operations.md",
    "examples/operations/alerts.yml": "operations/alerts.yml",
    "examples/operations/alerts_test.yml": "operations/alerts_test.yml",
    "examples/operations/compose.yml": "operations/compose.yml",
    "examples/operations/config.yml": "operations/config.yml",
    "examples/operations/dashboard.json": "operations/dashboard.json",
    "examples/operations/Dockerfile": "operations/Dockerfile",
    "examples/operations/kubernetes.yml": "operations/kubernetes.yml",
    "examples/operations/service.py": "operations/service.py",
    "examples/deepstream/page.html": "deepstream-page.html.txt",
    "examples/deepstream/service.py": "deepstream-service.py.txt",
}
PROGRAMS = ("fastapi_service", "flask_service", "uvloop_server", "metrics", "demo")
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_SOURCE = '<details class="mkdocstrings-source"'
_DRAWING = re.compile(r"!(\[[^]]*\])\(([\w/.-]+)\.svg\)")
_DARK = re.compile(r"@media \(prefers-color-scheme: dark\) \{\n((?:  .+\n)+)\}\n")
# A name in bold above a block of code; a successor with another name makes both a row of tabs.
_TAB = r"\*\*(?:async|blocking)\*\*\n\n(?:```\w*\n(?:.*\n)*?```\n\n?)+"
_TABS = re.compile(rf"^(?:{_TAB}){{2}}", re.MULTILINE)
_CODE = re.compile(r"^ *```.*?^ *```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Use GitHub's anchors, and put the version in the footer."""
    config.mdx_configs["toc"]["slugify"] = slug
    config.copyright = f"dscache {dscache.__version__}, Apache-2.0"
    return config


def slug(title: str, separator: str) -> str:
    """Return GitHub's anchor of a heading, so that links work there and on the site."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", separator)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files from outside docs/, the page of examples and the styles."""
    for path, name in ELSEWHERE.items():
        text = (PROJECT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=text))
    files.append(File.generated(config, "examples.md", content=_examples()))
    for name in ("site.css", "favicon.svg"):
        text = (HERE / name).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=text))
    for drawing in sorted((PROJECT / "docs").glob("*.svg")):
        text = drawing.read_text(encoding="utf-8")
        for scheme, changed in schemes(text).items():
            name = f"{drawing.stem}-{scheme}.svg"
            files.append(File.generated(config, name, content=changed))
    return files


def schemes(drawing: str) -> dict[str, str]:
    """Return a drawing for the light and the dark site.

    In the repository one file serves both, by the system's preference; the site has a switch.
    """
    rules = _DARK.search(drawing)
    if rules is None:
        raise PluginError("a drawing in docs/ has no colours for prefers-color-scheme: dark")
    light = drawing[: rules.start()] + drawing[rules.end() :]
    dark = drawing[: rules.start()] + rules[1] + drawing[rules.end() :]
    return {"light": light, "dark": dark}


def _examples() -> str:
    """Return the page of examples: the source of each, under its name."""
    parts = [
        "# Examples\n\nThe suite runs each of them against a real server. [Sharing records with a "
        "deepstream server](examples/deepstream/README.md) has a page of its own.\n"
    ]
    for name in PROGRAMS:
        source = (PROJECT / "examples" / f"{name}.py").read_text(encoding="utf-8")
        parts.append(f"## {name}.py\n\n```python\n{source}```\n")
    return "\n".join(parts)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at the pages of the site, and generate the reference of options."""
    name = page.file.src_uri
    if name == "configuration.md":
        try:
            markdown = reference(markdown)
        except ValueError as error:
            raise PluginError(str(error)) from error
    if name.startswith(("api-", "bench", "changelog")):
        # The guide comes first: the words of a search are explained there.
        page.meta["search"] = {"boost": 0.5}
    sources = {site: path for path, site in ELSEWHERE.items()} | {"examples.md": "EXAMPLES"}
    folder = posixpath.dirname(sources.get(name, f"docs/{name}"))

    def resolved(match: re.Match[str]) -> str:
        opening, target, anchor, closing = match.groups(default="")
        if ":" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        example = re.fullmatch(r"examples/(\w+)\.py", path)
        if example and example[1] in PROGRAMS:
            path, anchor = "examples.md", f"#{slug(f'{example[1]}.py', '-')}"
        elif path == "examples":
            path = "examples.md"
        else:
            path = ELSEWHERE.get(path, path.removeprefix("docs/"))
        return f"{opening}{path}{anchor}{closing}"

    markdown = _TABS.sub(_tabs, markdown)
    # Code is left alone: brackets and parentheses there aren't links.
    pieces, end = [], 0
    for code in _CODE.finditer(markdown):
        pieces += [_LINK.sub(resolved, markdown[end : code.start()]), code[0]]
        end = code.end()
    made = "".join([*pieces, _LINK.sub(resolved, markdown[end:])])
    return _DRAWING.sub(r"!\1(\2-light.svg#only-light) !\1(\2-dark.svg#only-dark)", made)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Keep the source of the package, shown in the API, out of the search."""
    return html.replace(_SOURCE, f"{_SOURCE} data-search-exclude")


def _tabs(match: re.Match[str]) -> str:
    """Return two named blocks of code as tabs."""
    lines = []
    for line in match[0].splitlines():
        name = re.fullmatch(r"\*\*(async|blocking)\*\*", line)
        lines.append(f'=== "{name[1].capitalize()}"' if name else f"    {line}".rstrip())
    return "\n".join(lines) + "\n\n"
