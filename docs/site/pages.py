"""What mkdocs is told beyond mkdocs.yml: pages from elsewhere, links, the reference of options."""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pygments.formatters import HtmlFormatter

HERE = Path(__file__).parent
PROJECT = HERE.parent.parent
# The package is built in place, and may not be installed.
sys.path[:0] = [str(PROJECT), str(HERE)]

import dscache  # noqa: E402
from option_reference import reference  # noqa: E402

# Where on the site the project's documents are that don't stand in docs/.
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "LICENSE": "LICENSE.txt",
    "bench/README.md": "bench.md",
    "examples/deepstream/README.md": "sharing.md",
    "examples/deepstream/config.yml": "deepstream-config.yml",
}
PROGRAMS = ("fastapi_service", "flask_service", "uvloop_server", "metrics", "demo")
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Make the anchors that GitHub makes, and say the version."""
    config.mdx_configs["toc"]["slugify"] = slug
    config.copyright = f"dscache {dscache.__version__}, Apache-2.0"
    return config


def slug(title: str, separator: str) -> str:
    """Return the anchor of a heading, as GitHub makes it: links are right here and there."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", separator)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents from elsewhere, the examples' sources and the styles."""
    for path, name in ELSEWHERE.items():
        text = (PROJECT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=text))
    files.append(File.generated(config, "examples.md", content=_examples()))
    highlighting = HtmlFormatter(style="friendly").get_style_defs(".codehilite")
    files.append(File.generated(config, "pygments.css", content=highlighting))
    styles = (HERE / "site.css").read_text(encoding="utf-8")
    files.append(File.generated(config, "site.css", content=styles))
    return files


def _examples() -> str:
    """Return the page of examples: each one's source, with what it says of itself above it."""
    parts = [
        "# Examples\n\nThe suite runs each of them against a real server. [Sharing records with a "
        "deepstream server](examples/deepstream/README.md) has a page of its own.\n"
    ]
    for name in PROGRAMS:
        source = (PROJECT / "examples" / f"{name}.py").read_text(encoding="utf-8")
        parts.append(f"## {name}.py\n\n```python\n{source}```\n")
    return "\n".join(parts)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to where documents are on the site; make the reference of options."""
    name = page.file.src_uri
    if name == "configuration.md":
        try:
            markdown = reference(markdown)
        except ValueError as error:
            raise PluginError(str(error)) from error
    sources = {site: path for path, site in ELSEWHERE.items()} | {"examples.md": "EXAMPLES"}
    folder = posixpath.dirname(sources.get(name, f"docs/{name}"))

    def led(match: re.Match[str]) -> str:
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

    # Not in code, where what looks like a link is none.
    pieces, end = [], 0
    for code in _CODE.finditer(markdown):
        pieces += [_LINK.sub(led, markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*pieces, _LINK.sub(led, markdown[end:])])
