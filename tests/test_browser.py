"""The notebook in a real browser: JupyterLab on this machine, driven through Debian's chromium, on the demo model.

Skipped where there is no chromium (`apt-get install chromium`) or no playwright.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from conftest import FEW, SCRIPT, fill_form

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("no chromium on this machine: apt-get install chromium", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -r tests/requirements.txt")

MINUTES = 60_000  # milliseconds
LAB = "--no-browser --allow-root --IdentityProvider.token= --LabApp.expose_app_in_browser=True"
SETTINGS = {  # all cells are in the page, seen or not
    "notebook-extension/tracker": '{"windowingMode": "none"}',
    "apputils-extension/notification": '{"fetchNews": "false"}',
}


@pytest.fixture(scope="module")
def server(home, tmp_path_factory):
    """The address of a JupyterLab whose root folder holds the notebook, and that folder."""
    root = tmp_path_factory.mktemp("lab")
    notebook = nbformat.read(SCRIPT.with_suffix(".ipynb"), 4)
    fill_form(notebook, FEW | {"max_steps": 60, "control": False})
    nbformat.write(notebook, root / "notebook.ipynb")
    for name, text in SETTINGS.items():
        file = root / f"JUPYTERLAB_SETTINGS_DIR/@jupyterlab/{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(text)
    command = [sys.executable, "-m", "jupyterlab", *LAB.split(), f"--ServerApp.root_dir={root}"]
    folders = "JUPYTERLAB_SETTINGS_DIR JUPYTER_CONFIG_DIR JUPYTER_DATA_DIR JUPYTERLAB_WORKSPACES_DIR".split()
    own, log = os.environ | {name: str(root / name) for name in folders}, root / "server.log"
    with log.open("w") as said:
        process = subprocess.Popen(command, cwd=root, stdout=said, stderr=said, env=own)
        try:
            for _ in range(120):
                if address := re.search(r"http://[\w.]+:\d+", log.read_text()):  # a port that is free
                    break
                assert process.poll() is None, log.read_text()[-2000:]
                time.sleep(0.5)
            yield address[0], root
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def page(server):
    with playwright.sync_playwright() as engine:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(MINUTES)
        page.goto(f"{server[0]}/lab/tree/notebook.ipynb")
        page.wait_for_selector(".jp-Notebook .jp-Cell")
        page.wait_for_function("""async () => {
            const context = window.jupyterapp?.shell.currentWidget?.sessionContext;
            if (!context) return false;
            await context.ready;
            return context.session?.kernel?.status == 'idle';
        }""")
        yield page
        browser.close()


def cell_of(page, text):
    """The code cell whose source holds a text, with its outputs."""
    return page.locator(".jp-CodeCell", has=page.locator(".jp-InputArea", has_text=text)).first


@pytest.fixture(scope="module")
def finished(page, server):
    """Everything was run; the pictures that the fine-tuning cell showed, one after the other."""
    page.evaluate("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.locator(".jp-InputPrompt", has_text="[*]").first.wait_for()
    picture = cell_of(page, "tuned = fine_tune_pruned(").locator(".jp-OutputArea img").first
    kind = '[data-mime-type="application/vnd.jupyter.{}"]'.format
    errors = page.locator(f'{kind("error")}, {kind("stderr")}:has-text("Error")')
    seen, last = [], cell_of(page, "hand_over(run, tuned").locator(".jp-OutputArea-output a")
    while not last.count():
        source = picture.get_attribute("src") if picture.count() else None
        if source and source not in seen[-1:]:
            seen.append(source)
        assert not errors.count(), errors.first.inner_text()
        time.sleep(0.2)
    return seen


def test_all_cells_run_and_the_live_picture_changes_in_place(page, server, finished):
    assert len(finished) >= 3, "the picture did not change while training"
    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    time.sleep(2)
    code = [cell for cell in nbformat.read(server[1] / "notebook.ipynb", 4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    (tuning,) = (cell for cell in code if "tuned = fine_tune_pruned(" in cell.source)
    pictures = ["image/png" in output.get("data", {}) for output in tuning.outputs]
    assert sum(pictures) == 1, "one picture is left, whatever the number of steps"


def test_the_explorer_is_worked_with_slider_clicks_and_buttons(page, finished):
    """What the panel computes: test_explore.py. Here that every part of it reaches the screen and the kernel."""
    explorer = cell_of(page, "show_explorer(run, model, tokenizer").locator(".jp-OutputArea").first
    heads, slider = explorer.locator(".prune-head"), explorer.locator(".noUi-handle")
    heads.first.wait_for()
    explorer.scroll_into_view_if_needed()
    closed = explorer.locator(".prune-head", has_text="×")
    assert heads.count() == 32 and closed.count() == 10 and "10 of 32 heads closed" in explorer.inner_text()
    slider.press("End")  # every layer keeps a head
    explorer.get_by_text("lower one of the two").wait_for()
    assert "10 of 32 heads closed" in explorer.inner_text()
    for _ in range(5):
        slider.press("PageDown")
    explorer.get_by_text("22 of 32 heads closed").wait_for()
    assert "lower one of the two" not in explorer.inner_text() and closed.count() == 22
    closed.first.click()
    explorer.get_by_text("21 of 32 heads closed").wait_for()
    assert closed.count() == 21
    explorer.get_by_role("button", name="Measure").click()
    explorer.get_by_text("Validation perplexity").wait_for()
    said = re.search(r"Validation perplexity: dense ([\d.]+), shown ([\d.]+)", explorer.inner_text())
    assert 20 < float(said[1]) < 100 and float(said[2]) > float(said[1])
    explorer.locator("select").select_option("magnitude")
    explorer.get_by_text("Scoring with magnitude, once.").wait_for()
    explorer.get_by_text("22 of 32 heads closed").wait_for()  # the click is forgotten
    prompt = explorer.locator("input[type=text]").last
    prompt.fill("The function returns")
    prompt.press("Tab")
    explorer.get_by_role("button", name="Write").click()
    explorer.get_by_text("shown:").wait_for()
    assert explorer.inner_text().count("The function returns") >= 2
    explorer.get_by_role("button", name="Take it").click()
    explorer.get_by_text("Taken: test perplexity").wait_for()


def test_the_link_downloads_the_zip(page, server, finished):
    with page.expect_download() as download:
        cell_of(page, "hand_over(run, tuned").locator(".jp-OutputArea-output a").first.click()
    (archive,) = (server[1] / "results").glob("*.zip")
    assert Path(download.value.path()).read_bytes() == archive.read_bytes()
