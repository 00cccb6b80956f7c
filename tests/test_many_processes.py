"""Two processes do what one does: the same numbers, one folder, one voice."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

import PruningAndFineTuningColab as nb

SCRIPT = Path(nb.__file__)
TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
SHARING = [*TWO, Path(__file__).with_name("on_processors.py")]  # which runs the script that follows
FEW = ["--dataset", "python-docs", "--device", "cpu", "--max-steps", "12", "--eval-blocks", "7", "--calibration-blocks", "7", "--gate-steps", "12",
       "--repair-blocks", "8", "--block-length", "128"]


new_accelerate = pytest.mark.skipif(not nb.transformers.utils.is_accelerate_available("1.15.0"), reason="--fsdp needs accelerate 1.15")


@pytest.fixture(scope="module")
def demo(home):
    return nb.make_demo(nb.load_text(nb.Settings(dataset="python-docs"))["train"])


def walk(launcher, folder, *words):
    folder.mkdir(exist_ok=True)
    done = subprocess.run([*launcher, SCRIPT, *FEW, *words], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (path for path in (folder / "results").iterdir() if path.is_dir())
    return json.loads((results / "metrics.json").read_text()), done.stdout, results


@pytest.fixture(scope="module")
def one(demo, tmp_path_factory):
    return walk([sys.executable], tmp_path_factory.mktemp("one") / "process", "--model", demo)[0]


def test_two_processes_end_with_the_numbers_of_one(demo, one, tmp_path):
    two, said, results = walk(TWO, tmp_path / "two", "--model", demo)
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-3)
    assert torch.allclose(torch.tensor(two["importance"]), torch.tensor(one["importance"]), rtol=1e-3, atol=1e-3)
    assert two["heads"] == one["heads"]
    for stage, record in two["training"].items():
        assert record["tokens_per_step"] == one["training"][stage]["tokens_per_step"] and record["micro_batch"] == 2
        seen, wanted = record["history"]["perplexity"], one["training"][stage]["history"]["perplexity"]
        assert [step for step, _ in seen] == [step for step, _ in wanted]
        assert [value for _, value in seen] == pytest.approx([value for _, value in wanted], rel=1e-3)
    assert said.count("dense: perplexity") == 1 and said.count("results: results/") == 2  # the folder at the start, the zip in the end
    assert {"report.md", "dashboard.png", "model-compact"} <= {path.name for path in results.iterdir()} and Path(f"{results}.zip").exists()
    assert two["finished"] and not list(results.parent.glob("*.state"))


@new_accelerate
def test_a_model_that_is_trained_in_parts_ends_with_the_same_numbers(demo, one, tmp_path):
    """Were it not in parts, it could not be put together, and the run would fail."""
    two, _, results = walk(SHARING, tmp_path / "two", "--model", demo, "--fsdp")
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-4)
    for stage, record in two["training"].items():
        wanted = one["training"][stage]
        assert record["kept_step"] == wanted["kept_step"]
        assert [value for _, value in record["history"]["perplexity"]] == pytest.approx([value for _, value in wanted["history"]["perplexity"]], rel=1e-4)
    assert two["finished"] and (results / "model-compact" / "model.safetensors").exists() and not list(results.parent.glob("*.state"))


@new_accelerate
@pytest.mark.slow
def test_a_model_that_is_trained_in_parts_goes_on_after_a_kill(demo, tmp_path):
    whole, _, _ = walk(SHARING, tmp_path / "whole", "--model", demo, "--fsdp")
    folder = tmp_path / "killed"
    folder.mkdir()
    with subprocess.Popen([*SHARING, SCRIPT, *FEW, "--model", demo, "--fsdp"], cwd=folder) as process:
        while process.poll() is None and not list(folder.glob("results/*.state/trainer-*/*/checkpoint-5/trainer_state.json")):
            time.sleep(0.01)
        assert process.poll() is None
        for worker in [*psutil.Process(process.pid).children(recursive=True), process]:
            worker.kill()
    done = subprocess.run([*SHARING, SCRIPT, *FEW, "--model", demo, "--fsdp"], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "Going on with" in done.stdout, done.stderr[-3000:]
    (record,) = folder.glob("results/*/metrics.json")
    assert json.loads(record.read_text())["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-6)


@pytest.mark.slow
def test_where_one_process_alone_runs_out_of_memory_the_run_goes_on_with_smaller_batches(demo, one, tmp_path):
    """The second process has no room for two blocks in its third step, while the first waits for its gradients."""
    folder = tmp_path / "two"
    folder.mkdir()
    command = [*TWO, Path(__file__).with_name("short_of_memory.py"), SCRIPT, *FEW, "--model", demo]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode and done.stderr.count("failed: fine-tuning runs out of memory in process 1, but not in all: start the same command again, and it takes fewer blocks at once: 1.") == 1
    assert f'File "{SCRIPT}"' not in done.stderr, "no traceback of ours"
    two, said, _ = walk(command[:-len(FEW) - 3], folder, "--model", demo)
    assert "Going on with" in said and "[repair: kept from before]" in said
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-4) and two["finished"]
    assert {record["micro_batch"] for record in two["training"].values()} == {1}


GPUS = "several GPUs share a model: start this script with torchrun on them, or leave --fsdp out"


@pytest.mark.parametrize("kind, recent, mistake", [
    ("NO", True, f"there is one process, and {GPUS}"), ("MULTI_CPU", True, f"there is no GPU, and {GPUS}"), ("XLA", True, f"there is no GPU, and {GPUS}"),
    ("MULTI_GPU", False, "accelerate is .*, and has to be 1.15 or later"), ("MULTI_GPU", True, "")])
def test_sharing_wants_several_gpus_and_a_recent_accelerate(kind, recent, mistake, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1" if kind == "NO" else "2")
    state = nb.SimpleNamespace(device=torch.device("cpu"), distributed_type=nb.accelerate.DistributedType[kind])
    monkeypatch.setattr(nb.accelerate, "PartialState", lambda cpu: state)
    monkeypatch.setattr(torch.distributed, "new_group", lambda **_: None)
    monkeypatch.setattr(nb, "MEETING", [])
    monkeypatch.setattr(nb.transformers.utils, "is_accelerate_available", lambda least: recent)
    if mistake:
        with pytest.raises(nb.UserError, match=f"fsdp is on, but {mistake}"):
            nb.join_processes(torch.device("cpu"), fsdp=True)
    assert nb.join_processes(torch.device("cpu"), fsdp=not mistake) == torch.device("cpu")


def test_heads_that_may_come_back_are_not_trained_in_parts():
    with pytest.raises(nb.UserError, match="fsdp is True, but must be off where reopen_heads is on: drop one of the two"):
        nb.Settings(fsdp=True, reopen_heads=True)


@pytest.mark.parametrize("strategy", ["entropy", "gradient"])
def test_scores_are_added_up_over_the_shares(strategy, monkeypatch):
    """Both shares in one process, one after the other: what the second adds to the first is the whole."""
    from conftest import make

    model, blocks = make("llama"), torch.randint(3, 97, (5, 16))
    nb.add_gates(model)
    whole, parts = nb.get_strategy(strategy).score(model, blocks), []
    for rank in range(2):
        monkeypatch.setattr(nb, "own_share", lambda blocks, rank=rank: blocks[rank::2])
        parts.append(nb.get_strategy(strategy).score(model, blocks))
    assert torch.allclose(sum(parts), whole, rtol=1e-4)


def test_a_mistake_is_said_once(demo, tmp_path):
    done = subprocess.run([*TWO, SCRIPT, *FEW, "--model", demo, "--batch-size", "3",
                           "--strategy", "random", "--no-repair"], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert done.stderr.count("error: batch_size is 3, but must be a multiple of 2, the number of processes") == 1


def test_a_model_in_parts_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(nb.UserError, match="told to use FSDP, but heads are scored and cut on a whole model"):
        nb.join_processes(torch.device("cpu"))
