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
from pygments.formatters import HtmlFormatter

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
}
PROGRAMS = ("fastapi_service", "flask_service", "uvloop_server", "metrics", "demo")
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)


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
    highlighting = HtmlFormatter(style="friendly").get_style_defs(".codehilite")
    files.append(File.generated(config, "pygments.css", content=highlighting))
    styles = (HERE / "site.css").read_text(encoding="utf-8")
    files.append(File.generated(config, "site.css", content=styles))
    return files


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

    # Code is left alone: brackets and parentheses there aren't links.
    pieces, end = [], 0
    for code in _CODE.finditer(markdown):
        pieces += [_LINK.sub(resolved, markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*pieces, _LINK.sub(resolved, markdown[end:])])
