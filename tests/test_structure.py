"""The shape of the repository: what imports what, what a notebook is, what a parameter file is."""

import ast
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml

ROOT = Path(__file__).parents[1]
CORE = ROOT / "s4s_core"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PARAMS = sorted((ROOT / "params").glob("*.yaml"))

# Sentinels: a moved folder or a quietly skipped test must not turn the suite green.
AT_LEAST_NOTEBOOKS = 25
SKIPS = 7

# The reading order: a file of the top level imports those above it, and no folder.
METHOD = ["errors", "schedule", "grid", "denoiser", "solver", "published", "objective", "evaluate"]
METHOD += ["params", "setup", "teacher", "learn", "gauss_newton"]
# A folder imports the top level, and the folders above it that are named here; inside it, too, a
# file imports only those above it.
FOLDERS = {
    "models": (
        ["networks", "download", "mixture", "inception", "check", "zoo", "diffusers_pipeline"],
        [],
    ),
    "baselines": (["grid_search", "dpm_solver_v3", "learned"], []),
    "experiments": (
        ["cache", "executors", "experiment", "run", "cost", "tables", "plot"],
        ["models", "baselines"],
    ),
    "lessons": (["density", "exact", "interactive"], ["experiments"]),
    "deploy": (
        ["compiled", "family", "part", "k_diffusion", "s4s_scheduler", "install", "hub"]
        + ["learn_family", "learn_pipeline"],
        ["models", "baselines", "experiments"],
    ),
}
NETWORKS = ["unet", "song_unet", "classifier", "io", "data", "pickles", "edm", "checkpoint"]
NETWORKS += ["latent", "training", "__init__"]
# The package's public names, its command, and the command's former name see everything.
ENTRANCES = ["__init__", "__main__", "experiment"]
ALWAYS = {"torch", "numpy", "safetensors", "yaml", "tqdm", "sklearn", "matplotlib", "pandas"}
WHERE_USED = ALWAYS | {"torchvision", "lpips", "torch_fidelity", "diffusers", "scipy"}
WHERE_USED |= {"transformers", "huggingface_hub", "parsl"}
WHERE_USED |= {"PIL", "filelock", "joblib"}  # matplotlib, torch and scikit-learn bring them
NO_TORCH = {"onnxruntime", "urllib", "wsgiref", "threading", "io", "warnings"}  # other doors
JUPYTER = {"IPython", "ipywidgets"}  # in these two modules alone


def imports(path: Path) -> list[tuple[str, bool]]:
    """(dotted name, whether at the top level) of every import in a file of s4s_core."""
    package = ["s4s_core", *path.relative_to(CORE).parts[:-1]]
    tree = ast.parse(path.read_text("utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            names = [".".join([*above, *filter(None, [node.module])])]
            if names == ["s4s_core"]:  # from . import grid
                names = [f"s4s_core.{alias.name}" for alias in node.names]
        else:
            continue
        found += [(name, node in tree.body) for name in names]
    return found


CORE_FILES = sorted(CORE.rglob("*.py"))


every_file = pytest.mark.parametrize("path", CORE_FILES, ids=lambda p: str(p.relative_to(CORE)))


def allowed_imports(place: tuple[str, ...]) -> set[tuple[str, ...]]:
    """The modules (as paths inside s4s_core) that the file at `place` may import."""
    top, *rest = place
    if not rest:
        return {(name,) for name in METHOD[: METHOD.index(top)]}
    own, others = FOLDERS[top]
    allowed = {(name,) for name in METHOD}
    allowed |= {(folder, name) for folder in others for name in FOLDERS[folder][0]}
    allowed |= {(folder,) for folder in others} | {("__version__",)}
    if rest[0] == "__init__":
        return allowed
    allowed |= {(top, name) for name in own[: own.index(rest[0])]}
    if rest[0] == "networks":
        allowed |= {(*place[:2], name) for name in NETWORKS[: NETWORKS.index(rest[1])]}
    return allowed


@every_file
def test_imports_run_in_reading_order(path):
    place = path.relative_to(CORE).with_suffix("").parts
    if place[0] in ENTRANCES:
        return
    allowed = allowed_imports(place)
    for name, _ in imports(path):
        if name.startswith("s4s_core"):
            parts = tuple(name.split(".")[1:])
            depth = 3 if parts[:2] == ("models", "networks") and place[:2] == parts[:2] else 2
            found = parts[: depth if parts[0] in FOLDERS else 1]
            assert found in allowed, f"{'.'.join(place)} imports {name}"


def test_every_file_has_a_place_in_the_reading_order():
    files = {path.stem for path in CORE.glob("*.py")}
    assert files == {*METHOD, *ENTRANCES}
    for folder, (names, _) in FOLDERS.items():
        found = {path.stem for path in (CORE / folder).glob("*.py")} - {"__init__"}
        assert found == {*names} - {"networks"}
    assert {path.stem for path in (CORE / "models" / "networks").glob("*.py")} == {*NETWORKS}


@every_file
def test_no_file_imports_a_private_name_of_another(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or node.module.startswith("s4s_core")):
            private = [a.name for a in node.names if re.match("_(?!_)", a.name)]
            assert not private, f"{ast.unparse(node)}"


def public_functions(body: list, prefix: str = ""):
    """(dotted name, node) of the public functions and methods in a module or class body."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield prefix + node.name, node


@every_file
def test_every_public_argument_and_answer_is_typed(path):
    for name, node in public_functions(ast.parse(path.read_text("utf-8")).body):
        if any("overload" in ast.unparse(d) for d in node.decorator_list) or name == "choose":
            continue  # its overloads are typed
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        arguments += [a for a in (node.args.vararg, node.args.kwarg) if a]
        untyped = [a.arg for a in arguments if not a.annotation and a.arg not in ("self", "cls")]
        assert not untyped, f"{name}: {untyped}"
        assert node.returns, f"{name} does not say what it returns"


@every_file
def test_dependencies_are_declared_and_extras_are_imported_where_used(path):
    for name, at_top in imports(path):
        package = name.split(".")[0]
        if package not in sys.stdlib_module_names and package != "s4s_core":
            allowed = ALWAYS if at_top else WHERE_USED
            if path.stem in ("interactive", "plot") and not at_top:
                allowed = allowed | JUPYTER
            if path.stem == "s4s_scheduler":  # stands alone in folders that are shared
                allowed = allowed | {"diffusers"}
            assert package in allowed, name


def test_networks_know_torch_only():
    known = {"torch", "safetensors", "tqdm", "s4s_core"}
    for path in sorted((CORE / "models" / "networks").glob("*.py")):
        for name, at_top in imports(path):
            package = name.split(".")[0]
            allowed = (
                known
                if at_top
                else known | {"numpy", "scipy", "sklearn", "diffusers", "transformers", "filelock"}
            )
            assert package in allowed | sys.stdlib_module_names, f"{path.name} imports {name}"


def test_importing_the_package_is_light():
    heavy = "scipy torchvision lpips torch_fidelity diffusers transformers".split()
    heavy += "sklearn matplotlib pandas joblib papermill IPython ipywidgets parsl".split()
    loaded = f"import sys, s4s_core; print(sorted(set({heavy}) & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= AT_LEAST_NOTEBOOKS


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def texts(notebook) -> str:
    """Everything in a notebook that a person reads as text: sources and textual outputs."""
    found = [cell.source for cell in notebook.cells]
    for output in outputs(notebook):
        found += [output.get("text", ""), *alts(output)]
        found += [str(v) for k, v in output.get("data", {}).items() if not k.startswith("image/")]
    return "\n".join(found)


def alts(output) -> list[str]:
    """What the picture of an output has as its alternative text: one, an empty one, or none."""
    if "image/png" not in output.get("data", {}):
        return []
    return [output.metadata.get("image/png", {}).get("alt", "")]


def tagged(notebook, tag: str):
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def test_notebook_opens_with_a_title_and_a_claim(notebook):
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    lines = [line for line in first.source.splitlines() if line.strip()]
    titles = [line for line in lines if line.startswith("# ")]
    assert len(titles) == 1 and lines[-1] != titles[0]


def test_papermill_understands_every_parameter(notebook, path):
    (cell,) = tagged(notebook, "parameters")
    body = ast.parse(cell.source).body
    names = []
    for statement in body:
        assert isinstance(statement, ast.Assign | ast.AnnAssign), ast.unparse(statement)
        ast.literal_eval(statement.value)  # what is derived here would not follow its parameter
        target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
        names.append(target.id)
    known = papermill.inspect_notebook(str(path))
    assert names == list(known)
    for name, parameter in known.items():
        assert parameter["help"].strip(), f"{name} is not explained"
        assert "=" not in parameter["help"], f"papermill cannot parse the help of {name}"


def test_notebook_is_committed_as_executed(notebook):
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for output in outputs(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
    assert "Traceback (most recent call last)" not in texts(notebook)


def test_every_picture_says_what_it_shows(notebook):
    said = [alt for output in outputs(notebook) for alt in alts(output)]
    assert all(len(alt.split()) >= 5 for alt in said), said
    assert len({*said}) == len(said)
    for cell in code_cells(notebook):
        assert "plt.show()" not in cell.source, cell.source  # plot.show takes the sentence


def test_notebook_carries_no_leftovers(notebook, path):
    assert path.stat().st_size < 300_000
    assert not tagged(notebook, "injected-parameters")
    assert "papermill" not in notebook.metadata
    for cell in notebook.cells:
        assert not {"papermill", "execution"} & set(cell.metadata)
    places = r"(?<![\w.])/(work|home|tmp|root|Users|opt)/\S*|[A-Z]:\\\w+"
    machine = re.search(places, texts(notebook))
    assert machine is None, machine[0]


def test_notebook_holds_no_logic(notebook, path):
    (parameters,) = tagged(notebook, "parameters")
    for cell in code_cells(notebook):
        if cell is not parameters:
            assert len(cell.source.splitlines()) <= 12, cell.source
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.ClassDef), cell.source
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            else:
                continue
            for name in names:
                package = name.split(".")[0]
                allowed = package in {"s4s_core", "torch", "sklearn", "diffusers"}
                allowed = allowed or name == "matplotlib.pyplot"
                allowed = allowed or (path.stem == "beyond_black_box" and package in NO_TORCH)
                assert allowed, f"a notebook imports {name}"


def strings(value):
    """Every string inside a YAML value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


def test_there_are_params():
    assert "digits" in [path.stem for path in PARAMS]


@pytest.mark.parametrize("path", PARAMS, ids=lambda path: path.stem)
def test_params_are_numbers_known_and_explained(path):
    from s4s_core.params import Params

    text = path.read_text("utf-8")
    params = yaml.safe_load(text)
    assert set(params) <= {field.name for field in fields(Params)} | {"preset", "presets"}
    for string in strings(params):
        # YAML 1.1 reads 1e-4 as a string; 1.0e-4 is a number.
        assert not re.fullmatch(r"[-+]?[\d.][\d._]*([eE][-+]?\d+)?", string), f"{string!r} is text"
    for line in text.splitlines():
        if line.strip():
            assert re.search(r"(^|\s)# \S", line), f"no unit or source: {line}"


def test_every_skip_is_declared_and_explained():
    found = []
    for path in sorted((ROOT / "tests").glob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        calls = {node.func: node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if re.fullmatch(r"pytest\.(skip|importorskip|mark\.skip|mark\.skipif)", name):
                call = calls.get(node)
                reasons = [k.value for k in call.keywords if k.arg == "reason"] if call else []
                reasons += call.args if call and name == "pytest.skip" else []
                assert reasons, f"{path.name}:{node.lineno}: {name} gives no reason"
                found.append(f"{path.name}:{node.lineno}")
    assert len(found) == SKIPS, found


def test_the_map_in_the_readme_names_every_notebook():
    rows = [
        line
        for line in (ROOT / "README.md").read_text("utf-8").splitlines()
        if line.startswith("|")
    ]
    assert {name for row in rows for name in re.findall(r"notebooks/(\w+)\.ipynb", row)} == {
        path.stem for path in NOTEBOOKS
    }


def test_links_in_the_readme_lead_somewhere():
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / "README.md").read_text("utf-8"))
    for link in links:
        assert (ROOT / link).exists(), link
