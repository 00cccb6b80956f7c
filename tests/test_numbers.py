"""Numbers that are no numbers are noticed where they first appear; what is saved is as wide as what came."""

import json
import math

import pytest
import torch
from conftest import CPU, SCRIPT, UNEVEN, gated, make, new_run, random_blocks, run_python, saved
from packaging.requirements import Requirement

import PruningAndFineTuningColab as nb

BLOCKS = random_blocks(4)


def test_where_float16_is_too_narrow_all_is_computed_in_float32(tmp_path, capsys):
    plain, overflowing = make("llama"), make("llama")
    with torch.no_grad():  # it computes more than float16 can hold, and what float32 can hold
        overflowing.model.layers[0].mlp.up_proj.weight.mul_(1e5)
        overflowing.model.layers[0].mlp.down_proj.weight.mul_(1e-5)
    for model, dtype in ((plain, torch.float16), (overflowing, torch.float32)):
        run = new_run(tmp_path, torch.float16)
        nb.add_gates(model)
        nb.try_float16(run, model, BLOCKS[:1])
        assert nb.COMPUTING.dtype == dtype and run.metrics["precision"] == str(dtype).removeprefix("torch.")
        said = "float16 is too narrow for this model (first in model.layers.0.mlp.up_proj)" in capsys.readouterr().out
        assert said == (dtype == torch.float32)
        assert math.isfinite(nb.perplexity(model, BLOCKS))
    assert new_run(tmp_path, torch.float16).folder == run.folder, "the run is the one that was asked for in float16"


def test_what_a_format_cannot_hold_ends_with_the_name_of_the_layer():
    model = gated("llama")
    model.lm_head.weight.data[0, 0] = 1e5  # it has grown
    with pytest.raises(nb.RunError, match="lm_head.weight does not fit into torch.float16: take a lower"):
        nb.rounded(model, torch.float16)
    model.model.layers[1].self_attn.q_proj.weight.data.fill_(float("nan"))
    for work, words in (
        (lambda: nb.perplexity(model, BLOCKS), "perplexity gives numbers that are not finite .first in"),
        (lambda: nb.repair(model, BLOCKS), "not finite .?(first )?in"),
        (lambda: nb.get_strategy("fisher").score(model, BLOCKS), "not finite .?(first )?in"),
    ):
        with pytest.raises(nb.RunError, match=f"{words} model.layers.1.self_attn"):
            work()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_saved_in_the_format_they_came_in(dtype, tmp_path):
    name = str(saved(tmp_path / "came", dtype=dtype))
    tokenizer, model = nb.load_model(name, CPU)
    assert model.came_in == dtype and model.dtype == torch.float32
    described = nb.describe_model(model, nb.Settings(model=name))
    assert described["saved_in"] == described["came_in"] == str(dtype).removeprefix("torch.")
    assert described["file_bytes"] == (tmp_path / "came" / "model.safetensors").stat().st_size
    nb.set_gates(model, UNEVEN)
    small = nb.compact(model)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-4)  # as training does
    nb.rounded(small, dtype)
    for form, save, made in (("compact", nb.save_compact, small), ("zeroed", nb.save_gated, nb.expand(small, model))):
        save(made, tokenizer, tmp_path / form, dtype)
        assert nb.largest_difference(made, nb.reopen(tmp_path / form), BLOCKS) == 0, "what was measured is saved"
        assert json.loads((tmp_path / form / "config.json").read_text())["dtype"] == described["saved_in"]
        size = (tmp_path / form / "model.safetensors").stat().st_size
        assert size < 1.1 * made.num_parameters() * dtype.itemsize + 6000
    assert (tmp_path / "compact" / "model.safetensors").stat().st_size < described["file_bytes"]


def test_the_oldest_versions_are_those_of_the_requirements():
    lines = [line for line in (SCRIPT.parent / "requirements.txt").read_text().splitlines() if line[:1].isalpha()]
    listed = {requirement.name: requirement for requirement in map(Requirement, lines)}
    for needed in map(Requirement, nb.NEEDED):
        assert set(map(str, needed.specifier)) <= set(map(str, listed[needed.name].specifier)), needed.name
    code = (
        "import importlib.metadata as m; real = m.version; "
        "m.version = lambda name: '4.57.1' if name == 'transformers' else real(name); import PruningAndFineTuningColab"
    )
    done = run_python("-c", code, cwd=SCRIPT.parent, status=1)
    said = "error: transformers is 4.57.1, but must be >=5.9: pip install -U transformers."
    assert done.stderr.splitlines() == [said]


def test_a_level_out_of_reach_is_said_before_the_first_perplexity():
    """What is said, and of sweeps too: test_gates.py."""
    script = SCRIPT.read_text()
    assert script.index("\n        print(plan_closing(model, settings)") < script.index('measure(run, "dense"')


def test_a_console_that_cannot_show_a_sign_ends_nothing(tmp_path):
    code = "import PruningAndFineTuningColab as nb, sys; sys.argv = ['x', '--model', 'demo', '--prompt', 'a\\u2192b']; "
    code += "nb.start_settings(''); print('\\u2192', 'went on')"
    assert "? went on" in run_python("-c", code, cwd=tmp_path, PYTHONIOENCODING="cp1252").stdout


def test_an_unforeseen_error_says_what_is_kept_and_how_to_go_on(tmp_path, monkeypatch, capfd):
    run = new_run(tmp_path)
    monkeypatch.setattr(nb, "run", run, raising=False)
    with pytest.raises(SystemExit) as stop:
        nb.stop_without_traceback(KeyError, KeyError("unforeseen"), None)
    said = capfd.readouterr().err
    assert stop.value.code == 1 and "KeyError: 'unforeseen'" in said
    assert f"What is there is in {run.folder}; the same command goes on from it" in said
