"""Nothing that was computed is lost: a run that was killed goes on, and ends with the numbers of one that was not."""

import dataclasses
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import make, tiny_tokenizer

import PruningAndFineTuningColab as nb

SCRIPT = Path(nb.__file__)
FEW = (
    "--max-steps 24 --eval-blocks 4 --calibration-blocks 8 --gate-steps 12 --repair-blocks 8 --block-length 128".split()
)


def new_run(folder, **changes):
    settings = nb.Settings(output_dir=str(folder), block_length=16, max_steps="20", **changes)
    return settings, nb.Run(settings, torch.device("cpu"), torch.float32)


def test_a_product_is_computed_once_for_what_it_depends_on(tmp_path):
    _, run = new_run(tmp_path)
    calls = []

    def compute():
        calls.append(1)
        return {"a": torch.arange(6.0).view(2, 3).T}, {"number": 0.1 + 0.2}

    first = run.load_or_compute("thing", (1, torch.ones(2)), compute)
    _, again = new_run(tmp_path)
    assert again.folder == run.folder
    second = again.load_or_compute("thing", (1, torch.ones(2)), compute)
    assert len(calls) == 1 and torch.equal(first[0]["a"], second[0]["a"]) and first[1] == second[1]
    again.load_or_compute("thing", (1, torch.zeros(2)), compute)
    again.load_or_compute("thing", (2, torch.ones(2)), compute)
    assert len(calls) == 3
    archive = again.finish()
    assert archive.exists() and not again.state.exists()
    _, other = new_run(tmp_path)
    assert other.folder != run.folder, "a finished run is left alone"


def test_a_fingerprint_sees_every_weight_and_gate(gates):
    model = make("gpt2")
    nb.add_gates(model)
    before = nb.fingerprint(model)
    assert nb.fingerprint(make("gpt2")) != before and nb.fingerprint(nb.copy.deepcopy(model)) == before
    nb.set_gates(model, gates)
    closed = nb.fingerprint(model)
    assert closed != before
    nb.set_gates(model, gates.flip(1))
    assert nb.fingerprint(model) != closed, "as many heads closed in every layer, but others"
    nb.set_gates(model, gates)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 5] += 1e-3
    assert nb.fingerprint(model) != closed


def test_only_an_unfinished_run_of_these_very_settings_is_gone_on_with(tmp_path, capsys):
    _, run = new_run(tmp_path)
    assert new_run(tmp_path)[1].folder == run.folder and "Going on with" in capsys.readouterr().out
    assert new_run(tmp_path, seed=1)[1].folder != run.folder
    assert new_run(tmp_path, resume="no")[1].folder != run.folder
    record = json.loads((run.folder / "metrics.json").read_text())
    alive = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        process = {
            "host": nb.this_process()["host"],
            "pid": alive.pid,
            "started": nb.psutil.Process(alive.pid).create_time(),
        }
        (run.folder / "metrics.json").write_text(json.dumps(record | {"process": process}))
        with pytest.raises(nb.UserError, match="still running"):
            new_run(tmp_path, resume=str(run.folder))
    finally:
        alive.kill()
        alive.wait()
    assert new_run(tmp_path, resume=str(run.folder))[1].folder == run.folder
    (run.folder / "metrics.json").write_text(json.dumps(record | {"versions": {}}))
    with pytest.raises(nb.UserError, match="its versions differ from this run's"):
        new_run(tmp_path, resume=str(run.folder))


def test_what_unfinished_runs_keep_is_said(tmp_path, capsys):
    _, run = new_run(tmp_path)
    run.state.mkdir()
    (run.state / "repair-0.safetensors").touch()
    os.truncate(run.state / "repair-0.safetensors", 2_300_000_000)  # a hole: it takes no room
    _, again = new_run(tmp_path)
    assert again.folder == run.folder and "Unfinished" not in capsys.readouterr().out
    new_run(tmp_path, seed=1)
    assert f"Unfinished runs keep 2.3 GB in {tmp_path}/*.state" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"asked": []}', '{"asked": {"model": 3}}', "\x00", '{"asked": {}, "perplexity": "x"}']
)
def test_a_spoilt_record_is_refused_when_named_and_passed_over_when_not(content, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.json").write_text(content)
    with pytest.raises(nb.UserError, match="resume is .* must be 'auto', 'no', or the folder of a run"):
        nb.read_settings(["--resume", str(tmp_path / "old")])
    assert new_run(tmp_path)[1].folder != tmp_path / "old"


def test_what_was_kept_keeps_its_time_and_what_is_computed_anew_gets_its_own(tmp_path):
    _, run = new_run(tmp_path)
    for depends, seconds in ((1, 5.0), (1, 5.0), (2, 0.0)):
        with run.step("score"):
            run.load_or_compute("score", (depends,), lambda: ({}, {}))
        if depends == 1:
            run.metrics["seconds"]["score"] = seconds  # as if it had taken so long
        else:
            assert run.metrics["seconds"]["score"] < 5
    with run.step("score"):
        run.load_or_compute("score", (1,), lambda: 1 / 0)
    assert run.metrics["seconds"]["score"] < 5


def test_weights_of_another_model_are_refused():
    with pytest.raises(nb.RunError, match="what was kept is of another model .*--resume no"):
        nb.put_weights(make("gpt2"), {"no.such.weight": torch.zeros(1)})


def test_resume_takes_the_settings_of_then(tmp_path):
    settings, run = new_run(tmp_path, strategy="fisher", pruning_level=0.2, control="no")
    again = nb.read_settings(["--resume", str(run.folder)])
    assert dataclasses.replace(again, resume="auto") == settings and again.resume == str(run.folder)


def test_heads_that_were_taken_in_the_explorer_are_taken_again(tmp_path, capsys, gates):
    scores, test_blocks = torch.rand(2, 4), torch.randint(3, 97, (4, 16), generator=torch.Generator().manual_seed(0))
    prune, explore = (
        part.split("\n# %%")[0]
        for part in SCRIPT.read_text().split("\n# %%\n")
        if "    run.settings = settings" in part or "explorer = show_explorer(" in part
    )
    for again in (False, True):
        settings, run = new_run(tmp_path, strategy="entropy", prompt="a")
        run.metrics["perplexity"]["dense"] = 3.0
        model = make("llama")
        nb.add_gates(model)
        room = vars(nb) | {
            "__name__": "__main__",
            "run": run,
            "settings": settings,
            "model": model,
            "tokenizer": tiny_tokenizer(),
            "test_blocks": test_blocks,
            "blocks": {"test": test_blocks},
            "importance": torch.arange(8.0).view(2, 4),
        }
        run.metrics["importance"] = room["importance"].tolist()
        taken = {
            "gates": gates.tolist(),
            "scores": scores.tolist(),
            "strategy": "magnitude",
            "level": 0.4,
            "by_hand": 2,
        }
        take = functools.partial(nb.take_heads, run, model, room["tokenizer"], test_blocks, taken)
        exec(prune, room)
        exec(explore, room)
        if not again:
            assert "taken before" not in capsys.readouterr().out and torch.equal(
                nb.get_gates(model), nb.choose_gates(room["importance"], 0.3)
            )
            take()
            exec(prune, room)
            assert run.metrics["taken"] is None and not torch.equal(nb.get_gates(model), gates), (
                "section 9, run again, has the last word"
            )
            take()
        assert torch.equal(nb.get_gates(model), gates) and torch.equal(torch.tensor(run.metrics["importance"]), scores)
        assert run.metrics["heads"]["by_hand"] == 2 and (run.settings.strategy, run.settings.pruning_level) == (
            "magnitude",
            0.4,
        )
        assert (run.folder / "heads.png").exists()
    assert (
        "These are the heads that were taken before the run was interrupted (section 9, run again, goes back to the "
        "strategy's)."
        in capsys.readouterr().out
        and run.taken is None
    )


def interrupt_at(monkeypatch, step):
    """Training is interrupted when this step is done."""
    original = nb.LivePlot.on_step_end

    def die(self, args, state, control, **others):
        if state.global_step == step:
            raise KeyboardInterrupt
        return original(self, args, state, control, **others)

    monkeypatch.setattr(nb.LivePlot, "on_step_end", die)


@pytest.mark.parametrize("how", ["before a checkpoint", "after one", "while one is written"])
def test_fine_tuning_goes_on_bit_for_bit(how, tmp_path, monkeypatch):
    """With dropout, so that the random numbers count."""
    model = make("gpt2", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    nb.set_gates(model, torch.tensor([[1.0, 0, 1, 1], [1, 1, 1, 0]]))
    blocks = {split: torch.randint(3, 97, (40, 16), generator=torch.Generator().manual_seed(2)) for split in nb.SPLITS}
    settings, run = new_run(tmp_path / "whole", learning_rate=1e-3)
    whole = nb.fine_tuned(run, "fine_tuned", lambda: nb.compact(model), blocks, settings)
    history = run.metrics["training"]["fine_tuned"]["history"]

    settings, run = new_run(tmp_path / "broken", learning_rate=1e-3)
    interrupt_at(monkeypatch, {"before a checkpoint": 1, "after one": 13, "while one is written": 14}[how])
    with pytest.raises(KeyboardInterrupt):
        nb.fine_tuned(run, "fine_tuned", lambda: nb.compact(model), blocks, settings)
    monkeypatch.undo()
    checkpoints = sorted(run.state.glob("trainer-*/*/checkpoint-*"))
    assert len(checkpoints) <= 2, "old checkpoints are removed"
    if how == "while one is written":
        half = checkpoints[0].with_name("checkpoint-14")
        shutil.copytree(checkpoints[-1], half)
        (half / "trainer_state.json").write_text('{"global_step": 14, "lo')
    _, run = new_run(tmp_path / "broken", learning_rate=1e-3)
    tuned = nb.fine_tuned(run, "fine_tuned", lambda: nb.compact(model), blocks, settings)
    assert all(torch.equal(value, dict(whole.named_parameters())[name]) for name, value in tuned.named_parameters())
    again = run.metrics["training"]["fine_tuned"]
    assert again["history"]["perplexity"] == history["perplexity"]
    assert not list(run.state.glob("trainer-*")), "checkpoints go when they are not needed any more"


@pytest.mark.parametrize("step", [5, 15])
def test_gates_that_are_being_chosen_go_on_bit_for_bit(step, tmp_path, monkeypatch):
    """Before and after the moment, half-way, when the gates are decided."""
    model = make("gpt2")
    nb.set_gates(model, torch.tensor([[1.0, 0, 1, 1], [1, 0, 1, 0]]))
    blocks = {split: torch.randint(3, 97, (40, 16), generator=torch.Generator().manual_seed(2)) for split in nb.SPLITS}
    more = {"learning_rate": 1e-3, "reopen_heads": True, "pruning_level": 0.375}
    settings, run = new_run(tmp_path / "whole", **more)
    whole = nb.fine_tuned(run, "fine_tuned", lambda: nb.copy.deepcopy(model), blocks, settings)
    settings, run = new_run(tmp_path / "broken", **more)
    interrupt_at(monkeypatch, step)
    with pytest.raises(KeyboardInterrupt):
        nb.fine_tuned(run, "fine_tuned", lambda: nb.copy.deepcopy(model), blocks, settings)
    monkeypatch.undo()
    assert list(run.state.glob("trainer-*/*/checkpoint-*"))
    _, run = new_run(tmp_path / "broken", **more)
    tuned = nb.fine_tuned(run, "fine_tuned", lambda: nb.copy.deepcopy(model), blocks, settings)
    assert torch.equal(nb.get_gates(tuned), nb.get_gates(whole)) and (nb.get_gates(tuned) == 0).sum() == 3
    assert all(torch.equal(value, dict(whole.named_parameters())[name]) for name, value in tuned.named_parameters())


def run_script(cwd, *words, kill_after=None):
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--model", "demo", *FEW, *words],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=kill_after)
        assert process.returncode == 0, said[-3000:]
        return said
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None


def outcome(cwd):
    (folder,) = (path for path in (cwd / "results").iterdir() if path.is_dir())
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["finished"] and Path(f"{folder}.zip").exists()
    for record in (*metrics.values(), metrics["training"]):  # as many steps as the speed of that moment says
        if isinstance(record, dict):
            record.pop("fine_tuned_as_long", None)
    return {
        name: metrics[name]
        for name in ("perplexity", "importance", "heads", "samples", "parameters", "blocks", "compact_difference")
    } | {name: record["history"]["perplexity"] for name, record in metrics["training"].items()}


def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(home, tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    run_script(tmp_path / "whole")
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--model", "demo", *FEW],
        cwd=tmp_path / "killed",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(1200):  # into the fine-tuning of the control
        if list(
            (tmp_path / "killed").glob("results/*.state/trainer-dense_fine_tuned-*/*/checkpoint-*/trainer_state.json")
        ):
            break
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    said = run_script(tmp_path / "killed")
    assert "Going on with" in said and all(
        f"[{name}: kept from before]" in said for name in ("importance", "repair", "fine_tuned", "measure_dense")
    )
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_nothing(home, tmp_path):
    """About seven minutes: pytest -m slow -s tests/test_resume.py"""
    nb.make_demo(nb.load_text(nb.Settings(dataset="python-docs"))["train"])  # not while the whole run is timed
    (tmp_path / "whole").mkdir()
    start = time.monotonic()
    run_script(tmp_path / "whole")
    seconds, wanted = time.monotonic() - start, outcome(tmp_path / "whole")
    chance, kills, runs = random.Random(0), 0, 0
    while kills < 20:
        folder = tmp_path / f"run{runs}"
        folder.mkdir()
        runs += 1
        while run_script(folder, kill_after=chance.uniform(3, 0.9 * seconds)) is None:
            if list(folder.glob("results/*.zip")) and not list(folder.glob("results/*.state")):
                break  # all was done, and only Python had not yet ended
            kills += 1
        assert outcome(folder) == wanted
    print(f"{kills} kills in {runs} runs, each ended with the numbers of the uninterrupted run ({seconds:.0f} s)")
