"""Puts together the site of mkdocs.yml: the pages where they lie, and one for each module.

Pages keep their places, so the links between them are right as they stand. What they link to beside
pages (examples, pictures) is copied. A link to a folder becomes its text, because a site has no
folders.
"""

from __future__ import annotations

import ast
import logging
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("*.md", "docs/**/*.md", "benchmarks/results/*.md")
MODULES = ("colltensor", *(f"colltensor.{name}" for name in ("gradients", "torch", "jax", "ray")))

_log = logging.getLogger("mkdocs.website")  # below mkdocs, whose --strict counts what it warns of
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replace the folders in the list of pages by the pages in them."""
    config.nav = [_listed(item) for item in config.nav or []]
    return config


def _listed(item: str | dict[str, list[str]]) -> str | dict[str, list[str]]:
    if isinstance(item, str):
        return item
    [(title, entries)] = item.items()
    pages = [
        sorted(_places(f"{entry}*.md")) if entry.endswith("/") else [entry] for entry in entries
    ]
    return {title: [page for some in pages for page in some]}


def _places(*patterns: str) -> list[str]:
    return [
        path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)
    ]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take the repository's pages and what they link to, in place of the files of docs/."""
    for file in list(files):
        if file.src_dir == config.docs_dir:  # the others are the theme's
            files.remove(file)
    pages = _places(*PAGES)
    linked = {
        target.relative_to(ROOT).as_posix()
        for page in pages
        for _, _, link, _ in _LINK.findall((ROOT / page).read_text())
        if (target := _target(page, link)) is not None and target.is_file()
    }
    for place in sorted({*pages, *linked}):
        files.append(File.generated(config, place, abs_src_path=str(ROOT / place)))
    for module in MODULES:
        files.append(File.generated(config, f"api/{module}.md", content=_reference(module)))
    return files


def _reference(module: str) -> str:
    """Return the page of a module's public names.

    A module of a name's own takes its place, so the name is added.
    """
    folder = ROOT.joinpath(*module.split("."))
    hidden = [name for name in _public(module) if (folder / f"{name}.py").exists()]
    title = f"---\ntitle: {module}\n---"
    return "\n\n".join(
        [title, f"::: {module}", *(f"::: {module}.{name}.{name}" for name in hidden)]
    )


def _public(module: str) -> list[str]:
    """Return what a module's ``__all__`` names; nothing where it has none."""
    path = ROOT.joinpath(*module.split("."))
    tree = ast.parse(
        (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    )
    named = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return next(named, [])


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> None:
    """Complain of public names that have no entry in the reference."""
    if page.file.src_uri.startswith("api/"):
        module = page.file.src_uri.removeprefix("api/").removesuffix(".md")
        for name in _public(module):
            if not re.search(rf'id="{re.escape(module)}\.(\w+\.)?{name}"', html):
                _log.warning("%s: %s is not in the reference", module, name)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leave the text alone of links to folders."""

    def without(link: re.Match[str]) -> str:
        target = _target(page.file.src_uri, link[3])
        return link[2] if target is not None and target.is_dir() else link[0]

    return _LINK.sub(without, markdown)


def _target(page: str, link: str) -> Path | None:
    """Return the file of the repository that a page links to, or None."""
    target = (ROOT / page).parent.joinpath(link).resolve()
    return target if "://" not in link and target.is_relative_to(ROOT) and target.exists() else None
