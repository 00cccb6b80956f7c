"""Nothing grows with the number of runs: the whole notebook, five times in one kernel."""

import json
import re
import shutil

import nbformat
import pytest
import transformers
from conftest import SCRIPT, client_of, fill_form

FEW = {
    "model": "model", "dataset": "python-docs", "block_length": 64, "eval_blocks": 4, "calibration_blocks": 4,
    "gate_steps": 6, "repair": 8, "max_steps": 4,
}  # fmt: skip
LOOK = """
import gc
import json
clear_device_cache(garbage_collection=True)
print(json.dumps({"ram": psutil.Process().memory_info().rss,
                  "models": sum(issubclass(type(thing), transformers.PreTrainedModel) for thing in gc.get_objects()),
                  "buttons": sum(issubclass(type(thing), widgets.Button) for thing in gc.get_objects())}))
"""


@pytest.mark.slow
def test_five_runs_in_one_kernel_take_the_memory_of_one(demo, tmp_path):
    """About three minutes: pytest -m slow -s tests/test_memory.py"""
    shutil.copytree(demo, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1536, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=128,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")  # 40 MB: large beside what else may vary
    notebook = nbformat.read(SCRIPT.with_suffix(".ipynb"), 4)
    fill_form(notebook, FEW)
    look = nbformat.v4.new_code_cell(LOOK)
    notebook.cells.append(look)
    client, seen = client_of(notebook, tmp_path), []
    with client.setup_kernel():
        for _ in range(5):
            for index, cell in enumerate(notebook.cells):
                if cell.cell_type == "code":
                    client.execute_cell(cell, index)
            said = "".join(output.get("text", "") for output in look.outputs)
            seen.append(json.loads(re.findall(r'{"ram".*?}', said)[-1]))  # each run adds its line
            print(seen[-1])
    assert seen[-1]["ram"] < 1.05 * seen[0]["ram"]
    assert seen[-1]["models"] == seen[0]["models"] and seen[-1]["buttons"] == seen[0]["buttons"]
