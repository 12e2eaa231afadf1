"""What the site shows of files that live elsewhere in the repository, and of pages that programs write."""

from __future__ import annotations

import pathlib
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = {"speed.md": ROOT / "benchmarks" / "RESULTS.md", "changes.md": ROOT / "CHANGELOG.md"}
NOTEBOOKS = ROOT / "experiments" / "notebooks"


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Adds pages of the repository that are not in docs/, and the notebooks as downloads."""
  for name, source in PAGES.items():
    # What a file says of docs/ is said from inside docs/ here.
    content = source.read_text().replace("](../docs/", "](").replace("](docs/", "](")
    files.append(File.generated(config, name, content=content))
  for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
    files.append(File.generated(config, f"notebooks/{notebook.name}", abs_src_path=str(notebook)))
  return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
  """Makes GitHub's Markdown that of the site.

  Lists inside of folded parts are lists, an escaped "<" is one, and links to folders, which a site cannot list, are none.
  """
  markdown = markdown.replace("<details>", '<details markdown="1">').replace("\\<", "&lt;")
  return re.sub(r"\[([^\]]+)\]\(results\)", r"`docs/\1`", markdown)
