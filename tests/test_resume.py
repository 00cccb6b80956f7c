"""Nothing that was computed is lost: a run that was killed goes on, and ends with the numbers of one that was not."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from conftest import FEW_WORDS, OPEN, SCRIPT, gated, make, new_run, random_blocks, results_in, run_python

import PruningAndFineTuningColab as nb

FEW = {"block_length": 16, "max_steps": 20}


def test_a_product_is_computed_once_for_what_it_depends_on(tmp_path):
    run = new_run(tmp_path, **FEW)
    calls = []

    def compute():
        calls.append(1)
        return {"a": torch.arange(6.0).view(2, 3).T}, {"number": 0.1 + 0.2}, [1, "two"]

    first = run.cached("thing", (1, torch.ones(2)), compute)
    again = new_run(tmp_path, **FEW)
    assert again.folder == run.folder
    second = again.cached("thing", (1, torch.ones(2)), compute)
    assert len(calls) == 1 and torch.equal(first[0]["a"], second[0]["a"]) and first[1:] == second[1:]
    again.cached("thing", (1, torch.zeros(2)), compute)
    again.cached("thing", (2, torch.ones(2)), compute)
    assert len(calls) == 3
    archive = again.finish()
    assert archive.exists() and not again.state.exists()
    assert new_run(tmp_path, **FEW).folder != run.folder, "a finished run is left alone"


def test_a_fingerprint_sees_every_weight_and_gate(gates):
    model = gated("gpt2", OPEN)
    before = nb.fingerprint(model)
    assert nb.fingerprint(make("gpt2")) != before and nb.fingerprint(nb.copy.deepcopy(model)) == before
    nb.set_gates(model, gates)
    closed = nb.fingerprint(model)
    assert closed != before
    nb.set_gates(model, gates.flip(1))
    assert nb.fingerprint(model) != closed, "as many heads closed in every layer, but others"
    nb.set_gates(model, gates)
    model.transformer.h[1].mlp.c_fc.weight.data[3, 5] += 1e-3
    assert nb.fingerprint(model) != closed


def test_only_an_unfinished_run_of_these_settings_and_versions_is_gone_on_with(tmp_path, capsys, monkeypatch):
    run = new_run(tmp_path, **FEW)
    run.metrics["perplexity"]["dense"] = 7.0
    run.save()
    again = new_run(tmp_path, **FEW)
    assert again.folder == run.folder and "Going on with" in capsys.readouterr().out
    assert again.metrics["perplexity"] == {"dense": 7.0}
    others = [new_run(tmp_path, **FEW, seed=1), new_run(tmp_path, torch.bfloat16, **FEW)]
    monkeypatch.setattr(nb, "VERSIONS", nb.VERSIONS | {"torch": "0.1"})
    others.append(new_run(tmp_path, **FEW))
    assert len({run.folder, *(other.folder for other in others)}) == 4 and not capsys.readouterr().out
    assert not any(other.metrics["perplexity"] for other in others)


def test_a_run_that_another_process_computes_is_left_alone(tmp_path):
    run = new_run(tmp_path, **FEW)
    code = f"import conftest; print(conftest.new_run(conftest.Path({str(tmp_path)!r}), **{FEW!r}).folder)"

    def folder_elsewhere():
        return Path(run_python("-c", code, cwd=Path(__file__).parent).stdout.splitlines()[-1])

    other = folder_elsewhere()
    assert other != run.folder and other.parent == tmp_path and (other / "metrics.json").exists()
    run.lock.release()  # as when its process ends, however it ends
    assert folder_elsewhere() == max(run.folder, other)


def test_what_was_kept_keeps_its_time_and_what_is_computed_anew_gets_its_own(tmp_path):
    run, seconds = new_run(tmp_path, **FEW), []
    for depends in (1, 1, 2, 1):
        with run.step("score"):
            run.cached("score", (depends,), lambda: {})
        seconds.append(run.metrics["seconds"]["score"])
        run.metrics["seconds"]["score"] = 5.0 if depends == 1 else seconds[-1]  # as if it had taken so long
    assert seconds[1] == 5 and max(seconds[0], *seconds[2:]) < 5


# --- training


def interrupt_at(monkeypatch, step):
    """Training is interrupted in the step of this number, counted from 0 over all trainings; the steps so far."""
    original, steps = AcceleratedOptimizer.step, []

    def die(self):
        steps.append(1)
        if len(steps) > step:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(AcceleratedOptimizer, "step", die)
    return steps


BLOCKS = dict.fromkeys(nb.SPLITS, random_blocks(40, seed=2))


def same_weights(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_second_half_of_fine_tuning_reads_other_blocks(tmp_path, monkeypatch):
    seeds = {}

    def train(run, name, model, blocks, settings, teacher):
        seeds[name] = settings.seed
        return {}

    monkeypatch.setattr(nb, "train_all_or_adapters", train)
    model, run = gated("gpt2", OPEN), new_run(tmp_path, **FEW, reopen_heads=True, strategy="random", seed=2**32 - 1)
    run.metrics |= {"heads": {"closed": 0}, "model": {"saved_in": "float32"}}
    nb.fine_tune_pruned(run, model, model, BLOCKS)
    assert seeds == {"first_half": 2**32 - 1, "fine_tuned": 0}


@pytest.mark.parametrize("reopen, step, kept_steps", [
    (False, 1, 0), (False, 13, 12), (False, 14, 14),  # before the first measurement, after one, while one is written
    (True, 5, 5), (True, 15, 15),  # before and after the moment, half-way, when heads are chosen again
])  # fmt: skip
def test_fine_tuning_goes_on_bit_for_bit(reopen, step, kept_steps, tmp_path, monkeypatch):
    """With dropout, so that the random numbers count."""
    closed = torch.tensor([[1.0, 0, 1, 1], [1, 0, 1, 0]])

    def work(name):
        model = gated("gpt2", closed, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
        more = {"learning_rate": 1e-3, "reopen_heads": reopen, "pruning_level": 0.375, "strategy": "gradient"}
        run = new_run(tmp_path / name, **FEW, **more)
        run.metrics |= {"heads": {"closed": 3}, "model": {"saved_in": "float32"}}
        tuned = nb.fine_tune_pruned(run, model, nb.copy.deepcopy(model), BLOCKS)
        assert same_weights(model, make("gpt2")) and torch.equal(nb.get_gates(model), closed), "it is untouched"
        return run, tuned

    run, whole = work("whole")
    assert torch.equal(whole.kept, closed) != reopen and whole.kept.sum() == 5
    interrupt_at(monkeypatch, step)
    with pytest.raises(KeyboardInterrupt):
        work("broken")
    monkeypatch.undo()
    kept = sorted(tmp_path.glob("broken/*.state/training-*"))
    assert [file.suffix for file in kept] == [".pt"] * (kept_steps > 0), "one file, and it is whole"
    if step == 14:  # killed, there was no time to remove what is half written
        kept[0].with_name(kept[0].name + ".part").write_bytes(b"half")
    torch.manual_seed(99)
    steps = interrupt_at(monkeypatch, 100)
    again, tuned = work("broken")
    assert same_weights(tuned, whole) and torch.equal(tuned.kept, whole.kept)
    assert again.metrics.get("heads_after_fine_tuning") == run.metrics.get("heads_after_fine_tuning")
    for name, record in run.metrics["training"].items():
        kept = again.metrics["training"][name]
        assert kept["history"] == record["history"] and kept["kept_step"] == record["kept_step"]
        assert len(record["history"]["perplexity"]) == 10, "measurements in each training"
    assert len(steps) == 20 - kept_steps, "it goes on from the last measurement"
    assert not list(again.state.glob("training-*")), "which is not kept for longer than it is needed"


# --- the script

WORDS = [SCRIPT, "--model", "demo", *FEW_WORDS]


def outcome(cwd):
    folder, metrics = results_in(cwd / "results")
    assert Path(f"{folder}.zip").exists() and not list(cwd.glob("results/*.state"))
    names = ("perplexity", "importance", "heads", "samples", "parameters", "blocks", "compact_difference")
    histories = {name: record["history"]["perplexity"] for name, record in metrics["training"].items()}
    return {name: metrics[name] for name in names} | histories


def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(home, tmp_path):
    """The run of all tests was not killed, and had the same settings."""
    process = subprocess.Popen([sys.executable, *WORDS], cwd=tmp_path, stdout=subprocess.DEVNULL)
    for _ in range(2400):  # into the fine-tuning of the control
        if list(tmp_path.glob("results/*.state/training-dense_fine_tuned-*.pt")):
            break
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    said = run_python(*WORDS, cwd=tmp_path).stdout
    assert "Going on with" in said and "dense + fine-tuned: step " in said
    assert "dense + fine-tuned: step 1 of 12" not in said, "it goes on after the first measurement"
    for name in ("importance", "repair", "fine_tuned", "measure_dense"):
        assert f"[{name}: kept from before]" in said
    assert outcome(tmp_path) == outcome(home)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_nothing(home, tmp_path):
    """About five minutes: pytest -m slow -s tests/test_resume.py"""
    chance, kills, runs, wanted, start = random.Random(0), 0, 0, outcome(home), time.perf_counter()
    run_python(*WORDS, cwd=tmp_path)
    seconds = time.perf_counter() - start  # with the imports, which are half of it
    while kills < 20:
        folder = tmp_path / f"run{runs}"
        folder.mkdir()
        runs += 1
        while not list(folder.glob("results/*.zip")):
            try:
                run_python(*WORDS, cwd=folder, timeout=chance.uniform(3, 0.9 * seconds))
            except subprocess.TimeoutExpired:  # it was killed
                kills += 1
        assert outcome(folder) == wanted
    print(f"{kills} kills in {runs} runs, each ended with the numbers of the uninterrupted run ({seconds:.0f} s)")
