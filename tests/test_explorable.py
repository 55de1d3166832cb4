"""The page in explorable/: its numbers are the package's, in a browser by hand and in Node."""

import json
import re
import runpy
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
import torch

import s4s_core as s4s

FOLDER = Path(__file__).parents[1] / "explorable"
PAGE = (FOLDER / "index.html").read_text("utf-8")
DATA = json.loads(re.search(r'<script id="data".*?>(.*?)</script>', PAGE, re.S)[1])
NOISES = torch.tensor(DATA["noises"], dtype=torch.float64)
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
NAMES = ["iPNDM", "S4S", "LD3", "S4S-Alt", "joint"]
SEEDS = range(len(NOISES))

# A visitor: every button, a coefficient typed, times moved by keys and by dragging, also too far.
VISIT = """
const report = {solvers: {}, exact: exactEnds};
const now = () => ({...structuredClone(solver), points: results.map(r => r.points),
                    error: $("error").textContent, told: $("what").textContent, calls,
                    status: $("status").textContent});
const handle = (kind, i) => handles.find(h => h.kind === kind && h.i === i).element;
const press = (kind, i, key) =>
  handle(kind, i).dispatchEvent(new KeyboardEvent("keydown", {key, cancelable: true}));
const type = (input, value) => { input.value = value; input.dispatchEvent(new Event("input")); };
const pointer = (target, kind, clientX) =>
  target.dispatchEvent(new PointerEvent(kind, {clientX, bubbles: true, cancelable: true}));

for (const button of $("solvers").children) {
  button.click();
  report.solvers[button.dataset.name] = now();
}
$("solvers").children[1].click();  // S4S
const [first_, second] = $("rows").children[3].querySelectorAll("input");
type(second, "0.25");
press("t", 2, "ArrowRight");
press("t_model", 3, "ArrowLeft");
report.typed = now();
type(first_, "");
report.refused = {invalid: first_.getAttribute("aria-invalid"), ...now()};

const box = handle("t", 1).querySelector(".mark").getBoundingClientRect();
pointer(handle("t", 1), "pointerdown", box.left);
pointer(window, "pointermove", box.left + 20);
pointer(window, "pointerup", box.left + 20);
report.dragged = now();
pointer(window, "pointermove", box.left + 90);
report.released = now();
for (let n = 0; n < 40; n++) for (const kind of ["t", "t_model"]) press(kind, 1, "PageDown");
report.far = now();

$("step").click();
$("step").click();
report.stepped = {...now(), arrows: $("arrows").children.length};
$("reset").click();
report.reset = now();
const answer = document.createElement("pre");
answer.id = "report";
answer.textContent = JSON.stringify(report);
document.body.append(answer);
"""

# The same arithmetic with no page around it.
ALONE = """
const points = solver => noises.map(x => run(solver, mixture, x).points);
const report = {edited: points(edited), solvers: {}};
for (const name in solvers) report.solvers[name] = {points: points(editable(solvers[name], order))};
const {t} = Object.values(solvers)[0];
report.exact = noises.map(x => exactFlow(mixture, x, t[0], t.at(-1)).points.at(-1));
console.log(JSON.stringify(report));
"""


@pytest.fixture(scope="module")
def setup():
    return s4s.load("mixture")


@pytest.fixture(scope="module")
def exact(setup):
    return s4s.exact_path(setup, SEEDS, calls=2000)[1][-1]


def solver_of(found, setup) -> s4s.Solver:
    """The package's solver for the coefficients and times of the page, read as a file is."""
    grid = s4s.TimeGrid(setup.schedule, found["t"], [*found["t_model"], found["t"][-1]])
    b = [row + [0.0] * (DATA["order"] - len(row)) for row in found["b"]]
    return s4s.Solver.from_dict(s4s.Solver(s4s.Coefficients(b), grid).to_dict())


def assert_equal(found, expected):
    found = torch.tensor(found, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def assert_paths(points, solver, setup):
    assert_equal(points, torch.stack(list(solver.trajectory(setup.denoiser, NOISES)), 1))


def assert_numbers(report, setup, exact):
    """The five solvers and the exact flow are the package's, to 1e-6."""
    assert list(report["solvers"]) == NAMES
    assert_equal(report["exact"], exact)
    for name, found in report["solvers"].items():
        solver = s4s.Solver.load(FOLDER / "solvers" / f"{name}.json")
        assert_paths(found["points"], solver, setup)


def test_the_page_holds_what_the_package_makes_of_the_solver_files():
    number = r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?"
    written = runpy.run_path(str(FOLDER / "build.py"))["page"]()
    assert re.sub(number, "", written) == re.sub(number, "", PAGE)
    # Another processor may round otherwise.
    there, here = ([float(n) for n in re.findall(number, page)] for page in (written, PAGE))
    assert there == pytest.approx(here, rel=1e-12, abs=1e-12)


def test_the_compiled_solvers_of_the_page_draw_the_samples_of_the_package(setup):
    for name, entries in DATA["solvers"].items():
        compiled = s4s.CompiledSolver.from_dict(entries["compiled"])
        x = compiled.sample(lambda x, t: (x - setup.denoiser(x, NOISES.new_tensor(t))) / t, NOISES)
        solver = s4s.Solver.load(FOLDER / "solvers" / f"{name}.json")
        torch.testing.assert_close(x, solver.sample(setup.denoiser, NOISES), rtol=0, atol=1e-9)


def test_the_page_is_small_and_asks_for_no_other_file():
    assert len(PAGE.encode()) < 150_000
    assert "Content-Security-Policy\" content=\"default-src 'none';" in PAGE
    without_anchors = re.sub(r"<a href=.*?>", "", PAGE)
    assert not re.search(r"https?:|\bsrc=|@import|\bfetch\(|XMLHttp|import\(", without_anchors)
    for link in re.findall(r'<a href="(.*?)"', PAGE):
        assert (FOLDER / link).exists(), link


def test_the_times_have_drawn_keys_and_the_joint_solver_names_its_method():
    assert "○" not in PAGE  # some fonts fill it
    assert re.search(r'<svg class="key network"[^>]*><circle [^>]*/></svg> what\s+the', PAGE)
    assert re.search(r"\.key\.network { fill: none; }", PAGE)
    assert '{"joint": "joint (Gauss-Newton)"}' in PAGE and "${LABELS[each] ?? each}" in PAGE


def alone(setup) -> dict:
    """What the page's arithmetic gives in Node, for an edited solver as well."""
    edited = {"t": [80, 20, 2, 0.3, 0.05, 0.002], "t_model": [80, 15, 2.5, 0.3, 0.04]}
    edited["b"] = [[1.01], [1.4, -0.5], [2, -1.2, 0.3], [1.7, -0.9, 0.1], [0.8, 0.3, -0.2]]
    (arithmetic,) = re.findall(r'<script id="arithmetic">(.*?)</script>', PAGE, re.S)
    script = f"{arithmetic}\nconst {{mixture, order, noises, solvers}} = {json.dumps(DATA)};"
    script += f"\nconst edited = {json.dumps(edited)};{ALONE}"
    done = subprocess.run(["node", "-"], input=script, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert_paths(report["edited"], solver_of(edited, setup), setup)
    return report


def visited(folder: Path) -> dict:
    """What a browser shows a visitor who does all that VISIT does."""
    (folder / "page.html").write_text(PAGE.replace("</html>", f"<script>{VISIT}</script></html>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"]
    command += [f"--user-data-dir={folder / 'profile'}", "--dump-dom", f"{folder / 'page.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found = re.search(r'<pre id="report">(.*?)</pre>', done.stdout, re.S)
    assert found, f"the page stopped: {done.stderr[-2000:]}"
    return json.loads(unescape(found[1]))


@pytest.mark.slow
def test_the_arithmetic_of_the_page_is_that_of_the_package(setup, exact):
    if not shutil.which("node"):
        pytest.skip("needs node, which runs the page's arithmetic without a browser")
    assert_numbers(alone(setup), setup, exact)


@pytest.mark.kernel
def test_a_visitor_sees_the_numbers_of_the_package(setup, exact, tmp_path):
    if not BROWSER:
        pytest.skip("needs a browser: chromium or google-chrome")
    report = visited(tmp_path)
    assert_numbers(report, setup, exact)

    names = ("typed", "dragged", "far", "stepped", "reset")
    states = report["solvers"] | {name: report[name] for name in names}
    for found in states.values():  # whatever was edited, the package reads and repeats it
        solver = solver_of(found, setup)
        assert_paths(found["points"], solver, setup)
        distance = s4s.global_error(setup, solver, SEEDS, exact)
        rms = distance.square().mean().sqrt().item()
        assert float(found["error"]) == pytest.approx(rms, rel=6e-3)  # three digits are shown
        assert float(re.search(r"mean ([\d.]+)", found["told"])[1]) == pytest.approx(
            distance.mean().item(), rel=6e-3
        )

    loaded, typed = report["solvers"]["S4S"], report["typed"]
    assert typed["b"][3][1] == 0.25 and typed["t"][2] < loaded["t"][2]
    assert typed["t_model"][2] / typed["t"][2] == pytest.approx(1)  # went with the step
    assert typed["t_model"][3] > loaded["t_model"][3] and typed["t"][3] == loaded["t"][3]
    assert report["refused"]["invalid"] == "true" and report["refused"]["b"] == typed["b"]
    assert report["dragged"]["t"][1] < typed["t"][1]
    assert report["released"]["t"] == report["dragged"]["t"]
    assert sorted(report["far"]["t"], reverse=True) == report["far"]["t"]
    assert report["stepped"]["calls"] == 2 and report["stepped"]["arrows"] == 8
    assert "call 2 of 5" in report["stepped"]["status"]
    assert report["reset"] == loaded
