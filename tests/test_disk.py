"""A disk that is full, read-only or gone costs one sentence, and nothing that was there before."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import FEW_WORDS, SCRIPT, new_run, results_in, run_python

import PruningAndFineTuningColab as nb


def run_script(cwd, output, status=0):
    return run_python(SCRIPT, "--model", "demo", *FEW_WORDS, "--output-dir", output, cwd=cwd, status=status)


@pytest.fixture
def small_disk(tmp_path):
    """A function that makes a disk of so many megabytes, or changes its size."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = []

    def mount(size, *more):
        options = ",".join([f"size={size}m", *more, *(["remount"] if mounted else [])])
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True, text=True)
        if done.returncode and not mounted:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        assert not done.returncode, done.stderr
        mounted.append(place)
        return place

    yield mount
    if mounted:
        subprocess.run(["umount", "-l", place], check=True)


MANY = [pytest.param(size, marks=pytest.mark.slow) for size in (1, 2, 4, 6, 8, 16, 20, 24)]  # five minutes


@pytest.mark.parametrize("size", [12, *MANY])
def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(size, home, small_disk, tmp_path):
    """A disk of so many megabytes: pytest -m slow -s tests/test_disk.py. The run of all tests had the same settings."""
    place = small_disk(size)
    failed = run_script(tmp_path, place, status=1).stderr
    (said,) = (line for line in failed.splitlines() if line.startswith("failed: "))
    print(f"full at {size} MB: {said}")
    assert "No space left on device" in said and "Traceback" not in failed
    assert "the same command goes on from it" in said
    assert not list(place.rglob("*.part")), "nothing half written"
    for file in place.rglob("metrics.json"):
        json.loads(file.read_text())
    small_disk(200)
    assert "Going on with" in run_script(tmp_path, place).stdout
    folder, metrics = results_in(place)
    assert Path(f"{folder}.zip").exists()
    assert metrics["perplexity"] == results_in(home / "results")[1]["perplexity"]


def test_a_read_only_disk_is_said_at_once(small_disk, tmp_path):
    done = run_script(tmp_path, small_disk(1, "ro"), status=2)
    said = "no folder can be made there (Read-only file system): choose another place"
    assert said in done.stderr.splitlines()[-1]


def say(monkeypatch, capfd, run, caught):
    """What the script says of an error in the end: one line on stderr."""
    monkeypatch.setattr(nb, "run", run, raising=False)
    with pytest.raises(SystemExit) as stop:
        nb.stop_without_traceback(caught.type, caught.value, None)
    assert stop.value.code == 1
    (said,) = capfd.readouterr().err.splitlines()
    return said


def test_a_folder_that_has_gone_is_said_with_its_name(tmp_path, monkeypatch, capfd):
    run = new_run(tmp_path / "drive")
    os.rename(tmp_path / "drive", tmp_path / "unmounted")
    with pytest.raises(FileNotFoundError) as caught, run.step("a step"):
        pass
    said = say(monkeypatch, capfd, run, caught)
    assert said.startswith(f"failed: [Errno 2] No such file or directory: '{run.folder}")


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"),
    nb.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("write failed: No space left on device"),
])  # fmt: skip
def test_a_full_disk_is_known_in_the_words_of_every_library(error, tmp_path, monkeypatch, capfd):
    run = new_run(tmp_path)
    run.cached("first", (), lambda: {"a": torch.ones(3)})

    def fail(thing, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(type(error)) as caught, run.step("a step"):
        run.cached("second", (), lambda: {"a": torch.ones(3)})
    assert [path.name.split("-")[0] for path in run.state.glob("*.*")] == ["first"]
    said = say(monkeypatch, capfd, run, caught)
    assert said.startswith(f"failed: {error}. What is there is in {run.folder}") and "No space left on device" in said
