"""Two processes do what one does: the same numbers, one folder, one voice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make

import PruningAndFineTuningColab as nb

SCRIPT = Path(nb.__file__)
TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
FEW = (
    "--dataset python-docs --device cpu --max-steps 12 --eval-blocks 7 --calibration-blocks 7 --gate-steps 12 "
    "--repair-blocks 8 --block-length 128"
).split()


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
    assert (
        said.count("dense: perplexity") == 1 and said.count("results: results/") == 2
    )  # the folder at the start, the zip in the end
    assert {"report.md", "dashboard.png", "model-compact"} <= {path.name for path in results.iterdir()} and Path(
        f"{results}.zip"
    ).exists()
    assert two["finished"] and not list(results.parent.glob("*.state"))


@pytest.mark.slow
def test_where_one_process_alone_runs_out_of_memory_the_run_goes_on_with_smaller_batches(demo, one, tmp_path):
    """The second process has no room for two blocks in its third step, while the first waits for its gradients."""
    folder = tmp_path / "two"
    folder.mkdir()
    command = [*TWO, Path(__file__).with_name("short_of_memory.py"), SCRIPT, *FEW, "--model", demo]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    said = (
        "failed: fine-tuning runs out of memory in one of several processes: start the same command again, "
        "and it takes 1 blocks at once."
    )
    assert done.returncode and done.stderr.count(said) == 1
    assert f'File "{SCRIPT}"' not in done.stderr, "no traceback of ours"
    two, said, _ = walk(command[: -len(FEW) - 3], folder, "--model", demo)
    assert "Going on with" in said and "[repair: kept from before]" in said
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-4) and two["finished"]
    assert {record["micro_batch"] for record in two["training"].values()} == {1}


@pytest.mark.parametrize("blocks", [1, 5])
@pytest.mark.parametrize("strategy", ["entropy", "gradient"])
def test_what_the_shares_give_is_put_in_order(strategy, blocks, monkeypatch):
    """Both shares in one process, one after the other, as each process would see them."""
    model, blocks = make("llama"), torch.randint(3, 97, (blocks, 16))
    nb.add_gates(model)
    whole, parts = nb.get_strategy(strategy).score(model, blocks), []

    class Enough(Exception):
        pass

    def collect(part):
        parts.append(part)
        raise Enough

    for rank in range(2):
        monkeypatch.setattr(nb, "rank_and_world", lambda rank=rank: (rank, 2))
        monkeypatch.setattr(nb, "from_all_processes", collect)
        with pytest.raises(Enough):
            nb.get_strategy(strategy).score(model, blocks)
    monkeypatch.setattr(nb, "from_all_processes", lambda part: parts)
    assert torch.allclose(nb.get_strategy(strategy).score(model, blocks), whole, rtol=1e-4)


def test_a_mistake_is_said_once(demo, tmp_path):
    done = subprocess.run(
        [*TWO, SCRIPT, *FEW, "--model", demo, "--batch-size", "3", "--strategy", "random", "--no-repair"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode != 0
    assert done.stderr.count("error: batch_size is 3, but must be a multiple of 2, the number of processes") == 1


def test_a_model_in_parts_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(nb.UserError, match="told to use FSDP, but heads are scored and cut on a whole model"):
        nb.join_processes(torch.device("cpu"))
