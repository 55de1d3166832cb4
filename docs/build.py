"""Write the site: all notebooks as pages, the README, the explorable, and a reference of the API.

./do site
./do site --repository OWNER/NAME

The pages ask the network for nothing: formulas are MathML, and pictures lie in the pages or beside
them. With the address of a public repository, each notebook's page also links to Binder and Colab.
The copy for Colab begins with a cell that installs the package unless it is there, and its links
are absolute; it is read from the repository's branch gh-pages, which is where the site is to be
published.
A page lies where its file lies in the repository; links between files become links between pages.
"""

import argparse
import os
import re
import shutil
from pathlib import Path
from types import ModuleType

import nbformat
import pdoc
from jinja2 import DictLoader, Environment, FileSystemLoader
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter

import s4s_core

HERE = Path(__file__).parent
ROOT = HERE.parent
START, README = Path("docs/index.md"), Path("README.md")
SHELL = Environment(loader=FileSystemLoader(HERE), autoescape=False).get_template("page.html")
# nbconvert's page of a notebook, its solutions closed and its prompts left out.
CELLS = """
{% extends 'basic/index.html.j2' %}
{% block any_cell %}
{% if 'solution' in cell.metadata.get('tags', []) %}
<details class="solution"><summary>Solution</summary>{{ super() }}</details>
{% else %}{{ super() }}{% endif %}
{% endblock %}
"""
COLAB = "https://colab.research.google.com/github/{}/blob/gh-pages/colab/{}"
# HEAD is the default branch, as for Binder.
PICTURE = "https://raw.githubusercontent.com/{}/HEAD/{}"
FILE = "https://github.com/{}/blob/HEAD/{}"
INSTALL = """import importlib.util

if not importlib.util.find_spec("s4s_core"):
    %pip install --quiet git+https://github.com/{}"""


class MathRenderer(IPythonRenderer):
    """nbconvert's renderer of Markdown, with formulas as MathML."""

    def block_math(self, body: str) -> str:
        """Return a formula on a line of its own."""
        return convert(body, display="block")

    def inline_math(self, body: str) -> str:
        """Return a formula within a line."""
        return convert(body)


def from_markdown(text: str) -> str:
    """Return Markdown as HTML."""
    return MarkdownWithMath(renderer=MathRenderer(escape=False)).render(text)


def from_notebook(path: Path) -> str:
    """Return the cells of a notebook with their outputs as HTML."""
    exporter = HTMLExporter(
        template_name="basic",
        template_file="cells.j2",
        extra_loaders=[DictLoader({"cells.j2": CELLS})],
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    exporter.register_filter("markdown2html", from_markdown)
    return exporter.from_filename(str(path))[0]


def public_names() -> list[str]:
    """Return the names that `import s4s_core` offers, but for its files and folders."""
    names = vars(s4s_core).items()
    return sorted(n for n, value in names if n[0] != "_" and not isinstance(value, ModuleType))


def reference() -> str:
    """Return the page of all public names of the package, made from their docstrings."""
    listed = ModuleType(s4s_core.__name__)
    listed.__dict__.update(vars(s4s_core))
    # Without this list pdoc would leave out what other files define.
    listed.__dict__["__all__"] = public_names()
    pdoc.render.configure(show_source=False, template_directory=HERE)
    return pdoc.render.html_module(pdoc.doc.Module(listed), all_modules={})


def absolute(markdown: str, path: Path, repository: str) -> str:
    """Return Markdown of a file with its links to files of the repository made absolute."""

    def link(found: re.Match) -> str:
        target = Path(os.path.normpath(path.parent / found[2]))
        if not (ROOT / target).exists():  # an address, or no link: a formula may look like one
            return found[0]
        if target.suffix == ".ipynb":
            return found[1] + COLAB.format(repository, target.name)
        picture = target.suffix in (".png", ".svg")
        return found[1] + (PICTURE if picture else FILE).format(repository, target.as_posix())

    return re.sub(r'(\]\(|\b(?:href|src)=")([^\s)#"]+)', link, markdown)


def for_colab(path: Path, repository: str) -> nbformat.NotebookNode:
    """Return a notebook that installs the package first, unless it is there, for Colab."""
    notebook = nbformat.read(ROOT / path, nbformat.NO_CONVERT)
    for text in notebook.cells:
        if text.cell_type == "markdown":
            text.source = absolute(text.source, path, repository)
    cell = nbformat.v4.new_code_cell(INSTALL.format(repository), id="install")
    notebook.cells.insert(0, cell)
    return notebook


def reading_order() -> list[Path]:
    """Return all notebooks, in the order of the README's map."""
    rows = [line for line in (ROOT / README).read_text("utf-8").splitlines() if line[:1] == "|"]
    return [Path(name) for row in rows for name in re.findall(r"\]\((notebooks/\w+\.ipynb)\)", row)]


def address(path: Path) -> Path:
    """Return the place in the site of a file of the repository."""
    if path == Path("s4s_core"):
        return Path("api.html")
    if path == START:
        return Path("index.html")
    return path.with_suffix(".html") if path.suffix in (".md", ".ipynb") else path


def relink(html: str, path: Path) -> tuple[str, list[Path]]:
    """Return the page of a file with its links leading to pages, and the files that it links.

    A link to what is no file of the repository becomes plain text.
    """
    linked = []

    def link(found: re.Match) -> str:
        place, mark, part = found[2].partition("#")
        if not place or re.match(r"[a-z]+:", place):
            return found[0]
        target = Path(os.path.normpath(path.parent / place))
        if (ROOT / target).is_file():
            linked.append(target)
        elif target != Path("s4s_core"):
            return ""
        there = os.path.relpath(address(target), address(path).parent)
        return f'{found[1]}="{there}{mark}{part}"'

    return re.sub(r'\b(href|src)="([^"]*)"', link, html), linked


def page(path: Path, order: list[Path], repository: str | None) -> str:
    """Return the page of a Markdown file or a notebook, with the way to its neighbours."""
    source = ROOT / path
    notebook = path.suffix == ".ipynb"
    body = from_notebook(source) if notebook else from_markdown(source.read_text("utf-8"))
    title = re.search(r"<h1[^>]*>(.*?)(?:<a |</h1>)", body, re.S)
    at = order.index(path) if path in order else None
    return SHELL.render(
        title=re.sub("<.*?>", "", title[1]) if title else path.stem,
        body=body,
        style=HtmlFormatter().get_style_defs(".highlight"),
        start=path == START,
        up=os.path.relpath(".", path.parent),
        before=order[at - 1].name if at else None,
        after=order[at + 1].name if at is not None and at + 1 < len(order) else None,
        repository=repository if notebook else None,
        colab=COLAB.format(repository, path.name),
        path=path,
    )


def build(folder: Path, repository: str | None = None, only: list[Path] | None = None) -> None:
    """Write the site into a folder, anew.

    repository  owner/name on GitHub, for links to Colab and Binder
    only        the notebooks that get a page; None for all of them
    """
    order = reading_order()
    left_out = set(order) - set(only or order)
    order = [path for path in order if path not in left_out]
    waiting, done = [START, README, *order], set(left_out)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "api.html").write_text(reference(), "utf-8")
    while waiting:
        path = waiting.pop()
        if path in done:
            continue
        done.add(path)
        there = folder / address(path)
        there.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".md", ".ipynb", ".html"):
            source = ROOT / path
            html = source.read_text("utf-8") if path.suffix == ".html" else None
            html, linked = relink(html or page(path, order, repository), path)
            there.write_text(html, "utf-8")
            waiting += linked
        else:
            shutil.copy(ROOT / path, there)
    if repository:
        (folder / "colab").mkdir()
        for path in order:
            nbformat.write(for_colab(path, repository), folder / "colab" / path.name)


def repository_name(text: str) -> str:
    """Return text if it can name a repository on GitHub; argparse tells the user if it cannot."""
    if not re.fullmatch(r"[\w-]+/[\w.-]+", text):
        raise argparse.ArgumentTypeError(f"must be OWNER/NAME, as on GitHub, not {text!r}")
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="./do site", description="Write the site into site/.")
    explained = "the public repository, OWNER/NAME on GitHub: adds links to Colab and Binder"
    parser.add_argument("--repository", type=repository_name, help=explained)
    build(ROOT / "site", parser.parse_args().repository)
    print("Open site/index.html in a browser.")
