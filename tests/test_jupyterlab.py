"""A notebook in JupyterLab in a browser, by hand as it were: open it, Run > Run All Cells, look."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
TOKEN = "of-this-test"

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER and importlib.util.find_spec("selenium")),
        reason="needs a browser: chromium, chromedriver (Debian's chromium-driver) and selenium",
    ),
]

PANEL = "window.jupyterapp.shell.currentWidget"
# What the open notebook holds, and the picture under a cell once it is drawn.
CELLS = f"""
const cells = Array.from({PANEL}.content.model.cells).filter(cell => cell.type == 'code');
return [{PANEL}.sessionContext.session?.kernel?.status,
        cells.map(cell => cell.sharedModel.toJSON())];
"""
PICTURE = """
const image = arguments[0].querySelector('img');
return image && image.naturalWidth ? image.src : null;
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def jupyterlab(folder: Path):
    """The address of a JupyterLab that serves `folder` and keeps its own files there, too."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"]
    command += [f"--ServerApp.root_dir={folder}", f"--IdentityProvider.token={TOKEN}"]
    command += ["--LabApp.expose_app_in_browser=True"]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    names = ("JUPYTER_CONFIG", "JUPYTER_DATA", "JUPYTERLAB_SETTINGS", "JUPYTERLAB_WORKSPACES")
    own = {f"{name}_DIR": str(folder / ".jupyter" / name) for name in names}
    environment = {**os.environ, **own, "OMP_NUM_THREADS": "1"}
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/api?token={TOKEN}")
                break
            except OSError:
                assert server.poll() is None, (folder / "server.log").read_text()
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(30)


@contextmanager
def chromium(folder: Path):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "headless=new",
        "no-sandbox",
        "disable-dev-shm-usage",
        "window-size=1400,1800",
    ):
        options.add_argument(f"--{argument}")
    options.add_argument(f"--user-data-dir={folder / 'browser'}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def click(driver, css: str, text: str) -> None:
    """Click the element of the page that reads `text`, as soon as it is there."""
    from selenium.webdriver.common.by import By

    def find(driver):
        return next((e for e in driver.find_elements(By.CSS_SELECTOR, css) if e.text == text), None)

    until(driver, 60, find).click()


def until(driver, seconds: float, condition):
    """The first true value of condition(driver)."""
    from selenium.common.exceptions import JavascriptException, StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    not_yet = (JavascriptException, StaleElementReferenceException)
    return WebDriverWait(driver, seconds, 0.5, not_yet).until(condition)


def test_a_lesson_runs_from_open_to_run_all_and_its_sliders_move_the_picture(tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    name = "02_time_grids.ipynb"
    notebook = nbformat.read(NOTEBOOKS / name, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
    nbformat.write(notebook, tmp_path / name)
    (sliders,) = [i for i, cell in enumerate(notebook.cells) if "explore_times" in cell.source]

    with jupyterlab(tmp_path) as address, chromium(tmp_path) as driver:
        driver.get(f"{address}/lab/tree/{name}?token={TOKEN}")
        click(driver, ".lm-TabBar-tabLabel", name)
        until(driver, 120, lambda d: d.execute_script(CELLS)[0] == "idle")
        click(driver, ".lm-MenuBar-itemLabel", "Run")
        click(driver, ".lm-Menu-itemLabel", "Run All Cells")

        def finished(driver) -> list | None:
            kernel, cells = driver.execute_script(CELLS)
            outputs = [output for cell in cells for output in cell["outputs"]]
            errors = [output for output in outputs if output["output_type"] == "error"]
            assert not errors, errors
            counted = all(cell["execution_count"] for cell in cells)
            return cells if counted and kernel == "idle" else None

        cells = until(driver, 300, finished)
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))

        # The page draws only what is near the visible part.
        driver.execute_script(f"{PANEL}.content.scrollToItem({sliders}, 'start')")
        handle = "noUi-handle"
        cell = f"//div[contains(@class, 'jp-CodeCell') and .//div[contains(@class, '{handle}')]]"
        (cell,) = until(driver, 60, lambda d: d.find_elements(By.XPATH, cell))
        before = until(driver, 60, lambda d: d.execute_script(PICTURE, cell))
        cell.find_element(By.CLASS_NAME, handle).send_keys(3 * Keys.ARROW_RIGHT)
        until(driver, 60, lambda d: d.execute_script(PICTURE, cell) not in (None, before))
        driver.save_screenshot(tmp_path / "screenshot.png")
