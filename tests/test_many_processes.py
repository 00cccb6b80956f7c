"""Two processes do what one does: the same numbers, one folder, one voice."""

from pathlib import Path

import accelerate
import pytest
import torch
from conftest import FEW_WORDS, SCRIPT, gated, random_blocks, results_in, run_python

import PruningAndFineTuningColab as nb

TWO = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
FEW = [SCRIPT, "--dataset", "python-docs", "--device", "cpu", *FEW_WORDS]


def walk(folder, *words):
    folder.mkdir(exist_ok=True)
    done = run_python(*words, cwd=folder)
    return done.stdout, *results_in(folder / "results")


@pytest.fixture
def one(home):
    """The record of the run of all tests, which had the same settings."""
    return results_in(home / "results")[1]


def require_the_same(two, one, rel):
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=rel) and two["heads"] == one["heads"]
    assert torch.allclose(torch.tensor(two["importance"]), torch.tensor(one["importance"]), rtol=rel, atol=rel)
    assert set(two["training"]) == set(one["training"]) == {"fine_tuned", "dense_fine_tuned"}
    for stage, record in two["training"].items():
        assert record["tokens_per_step"] == one["training"][stage]["tokens_per_step"]
        for kind, points in record["history"].items():
            wanted = one["training"][stage]["history"][kind]
            torch.testing.assert_close(torch.tensor(points), torch.tensor(wanted), rtol=rel, atol=0)


def test_two_processes_end_with_the_numbers_of_one(demo, one, tmp_path):
    said, results, two = walk(tmp_path / "two", *TWO, *FEW, "--model", demo)
    require_the_same(two, one, 1e-3)
    assert said.count("dense, untouched: perplexity") == 1
    assert said.count("results: results/") == 2  # the folder at the start, the zip in the end
    assert {"report.md", "dashboard.png", "model-compact"} <= {path.name for path in results.iterdir()}
    assert Path(f"{results}.zip").exists() and not list(results.parent.glob("*.state"))


@pytest.mark.slow
def test_where_one_process_alone_runs_out_of_memory_it_takes_smaller_batches(demo, one, tmp_path):
    """The second process has no room for two blocks from its third step on, while the first waits for its gradients."""
    launcher = [*TWO, Path(__file__).with_name("short_of_memory.py")]
    _, results, two = walk(tmp_path / "two", *launcher, *FEW, "--model", demo)
    assert (tmp_path / "two" / "ran out of memory").exists()
    require_the_same(two, one, 1e-3)
    assert Path(f"{results}.zip").exists()


@pytest.mark.parametrize("blocks", [1, 5])
@pytest.mark.parametrize("strategy", ["entropy", "gradient"])
def test_what_the_shares_give_is_put_in_order(strategy, blocks, monkeypatch):
    """Both shares in one process, one after the other, as each process would see them."""
    model, blocks = gated("llama", torch.ones(2, 4)), random_blocks(blocks)
    whole, shares = nb.get_strategy(strategy).score(model, blocks), []

    class Enough(Exception):
        pass

    def collect(parts):
        shares.extend(parts)
        raise Enough

    state = accelerate.PartialState()
    monkeypatch.setattr(state, "num_processes", 2)
    for rank in range(2):
        monkeypatch.setattr(state, "process_index", rank)
        monkeypatch.setattr(nb, "gather_object", collect)
        with pytest.raises(Enough):
            nb.get_strategy(strategy).score(model, blocks)
    assert sum(map(len, shares)) == len(blocks), "every block once"
    monkeypatch.setattr(nb, "gather_object", lambda parts: shares)
    assert torch.allclose(nb.get_strategy(strategy).score(model, blocks), whole, rtol=1e-4)


def test_a_mistake_is_said_once(demo, tmp_path):
    words = ["--model", demo, "--strategy", "random", "--no-repair", "--pruning-level", "0.95"]
    said = run_python(*TWO, *FEW, *words, cwd=tmp_path, status=1).stderr
    assert said.count("error: pruning_level is 0.95 with min_heads 1") == 1
    assert not list(tmp_path.glob("results/*")), "a mistake leaves nothing behind"
