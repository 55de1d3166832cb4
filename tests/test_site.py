"""The site of ./do site: a browser shows its pages, and the links lead somewhere."""

import os
import re
import runpy
import subprocess
from html import unescape
from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from test_explorable import BROWSER

import s4s_core as s4s

ROOT = Path(__file__).parents[1]
BUILD = runpy.run_path(str(ROOT / "docs" / "build.py"))
ONLY = [Path("notebooks/01_noise_schedules.ipynb"), Path("notebooks/02_time_grids.ipynb")]
LESSON = "notebooks/02_time_grids.html"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site with two of the notebooks: a page takes half a second, and all are made alike."""
    folder = tmp_path_factory.mktemp("site")
    BUILD["build"](folder, only=ONLY)
    return folder


def pages(site: Path) -> dict[Path, str]:
    return {path: path.read_text("utf-8") for path in site.rglob("*.html")}


@pytest.mark.slow
def test_links_lead_to_pages_files_and_headings(site):
    left_out = {BUILD["address"](path) for path in BUILD["reading_order"]()}
    found = pages(site)
    assert len(found) >= 8
    for path, html in found.items():
        for link in re.findall(r'\b(?:href|src)="([^"]*)"', html):
            place, _, part = unescape(link).partition("#")
            if re.match(r"[a-z]+:", place):
                continue
            target = Path(os.path.normpath(path.parent / place)) if place else path
            if target.relative_to(site) not in left_out:
                assert target.is_file(), f"{path.name}: {link}"
            if part and target in found:
                assert f'id="{part}"' in found[target], f"{path.name}: {link}"
            assert target.suffix not in (".ipynb", ".md"), f"{path.name}: {link}"


def test_every_notebook_has_a_place_and_a_link():
    order = BUILD["reading_order"]()
    assert sorted(order) == sorted(
        path.relative_to(ROOT) for path in (ROOT / "notebooks").glob("*.ipynb")
    )


def test_a_lesson_has_neighbours_a_way_home_and_closed_solutions(site):
    html = (site / LESSON).read_text("utf-8")
    assert '<a href="01_noise_schedules.html" rel="prev">' in html
    assert '<a href="../index.html">' in html and '<a href="../api.html">' in html
    assert html.count('<details class="solution"><summary>Solution</summary>') == 3
    assert "<details open" not in html and "data:image/png;base64" in html


def test_formulas_are_mathml_and_nothing_comes_from_the_network(site):
    for path, html in pages(site).items():
        assert not re.search(r'<(script|img|link|iframe)[^>]*\s(src|href)="(https?:)?//', html), (
            path
        )
    body = re.sub(
        r"<pre.*?</pre>|<code.*?</code>", "", (site / LESSON).read_text("utf-8"), flags=re.S
    )
    assert body.count("<math") > 10 and "$" not in body


def test_the_reference_holds_every_public_name_with_its_docstring(site):
    html = (site / "api.html").read_text("utf-8")
    public = BUILD["public_names"]()
    assert {"Solver", "learn_gauss_newton", "run_all", "UsageError"} <= set(public)
    for name in public:
        assert f'id="{name}"' in html, name
    assert unescape(html).count(s4s.time_logsnr.__doc__.splitlines()[0]) == 1


def test_badges_need_a_repository(tmp_path, site):
    assert not any("colab" in html for html in pages(site).values())
    order = BUILD["reading_order"]()
    html = BUILD["page"](ONLY[0], order, "ada/s4s")
    notebook = "ada/s4s/blob/gh-pages/colab/01_noise_schedules.ipynb"
    assert f"https://colab.research.google.com/github/{notebook}" in html
    assert "mybinder.org/v2/gh/ada/s4s/HEAD?labpath=notebooks/01_noise_schedules.ipynb" in html


def test_a_copy_for_colab_installs_the_package_unless_it_is_there(tmp_path):
    BUILD["build"](tmp_path / "site", "ada/s4s", only=ONLY)
    copies = {path.stem: nbformat.read(path, 4) for path in tmp_path.glob("site/colab/*.ipynb")}
    assert copies.keys() == {path.stem for path in ONLY}
    shell, asked = InteractiveShell(), []
    shell.register_magic_function(asked.append, magic_name="pip")
    for name, notebook in copies.items():
        nbformat.validate(notebook)
        first, *rest = notebook.cells
        original = ROOT / "notebooks" / f"{name}.ipynb"
        assert [c.id for c in rest] == [c.id for c in nbformat.read(original, 4).cells]
        assert shell.run_cell(first.source).success and not asked
        assert shell.run_cell(first.source.replace("s4s_core", "s4s_missing")).success
        assert asked.pop() == "install --quiet git+https://github.com/ada/s4s"


def test_the_links_of_a_copy_for_colab_are_absolute_and_lead_to_files():
    ours = re.compile(
        r"https://(?:(colab\.research\.google\.com/github/ada/s4s/blob/gh-pages/colab)|"
        r"(raw\.githubusercontent\.com/ada/s4s/HEAD)|github\.com/ada/s4s/blob/HEAD)/([^#]+)"
    )
    pictures = 0
    for path in BUILD["reading_order"]():
        cells = BUILD["for_colab"](path, "ada/s4s").cells
        text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        for kind, link in re.findall(r'\b(href|src)="([^"]*)"', BUILD["from_markdown"](text)):
            assert re.match(r"#|https?://", link), f"{path.name}: {link}"
            if found := ours.match(link):
                target = ROOT / ("notebooks" if found[1] else ".") / found[3]
                assert target.is_file(), f"{path.name}: {link}"
                assert bool(found[1]) == (target.suffix == ".ipynb"), f"{path.name}: {link}"
                assert bool(found[2]) == (kind == "src"), f"{path.name}: {link}"
                pictures += kind == "src"
    assert pictures


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a](x.ipynb#b)", "[a](x.ipynb#b)"),
        ("[a](#b) [c](https://d.org/README.md)", "[a](#b) [c](https://d.org/README.md)"),
        (r"$\left[a\right](t)$", r"$\left[a\right](t)$"),
        (
            "[a](00_tour.ipynb#b)",
            "[a](https://colab.research.google.com/github/ada/s4s/blob/gh-pages/colab/00_tour.ipynb#b)",
        ),
        ("[a](SYMBOLS.md)", "[a](https://github.com/ada/s4s/blob/HEAD/notebooks/SYMBOLS.md)"),
        (
            "![a](../figures/tour.png)",
            "![a](https://raw.githubusercontent.com/ada/s4s/HEAD/figures/tour.png)",
        ),
        (
            '<img alt="a" src="../figures/tour.png">',
            '<img alt="a" src="https://raw.githubusercontent.com/ada/s4s/HEAD/figures/tour.png">',
        ),
    ],
)
def test_only_links_to_files_become_absolute(text, expected):
    assert BUILD["absolute"](text, ONLY[0], "ada/s4s") == expected


def test_the_explorable_leads_back(site):
    html = (site / "explorable/index.html").read_text("utf-8")
    assert '<a href="../README.html">' in html and (site / "README.html").is_file()


@pytest.mark.parametrize("text", ["ada", "https://github.com/ada/s4s", "ada/s4s/x", 'a"/b'])
def test_a_repository_is_an_owner_and_a_name(text):
    with pytest.raises(Exception, match="must be OWNER/NAME") as info:
        BUILD["repository_name"](text)
    assert repr(text) in str(info.value)


@pytest.mark.kernel
@pytest.mark.parametrize("name", ["index.html", LESSON, "api.html"])
def test_a_browser_shows_a_page_without_complaint(site, tmp_path, name):
    if not BROWSER:
        pytest.skip("needs a browser: chromium or google-chrome")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path}", "--dump-dom", f"{site / name}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    assert "</footer>" in done.stdout or "</main>" in done.stdout


def test_every_picture_of_a_page_says_what_it_shows_and_how_large_it_is(site):
    images = re.findall(r"<img[^>]*>", (site / LESSON).read_text("utf-8"))
    assert len(images) >= 3
    for image in images:
        said = re.search(r'alt="([^"]*)"', image)
        assert said and len(said[1].split()) > 5 and "No description" not in said[1], image[:300]
        assert re.search(r'width="\d+"', image), image[:300]
