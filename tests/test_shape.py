"""The house: the story is short and open, the machinery is folded, and a cell can be taken in at a glance."""

import ast
import re
from pathlib import Path

import jupytext
import pytest

import PruningAndFineTuningColab as nb

SCRIPT = Path(nb.__file__)
CELLS = jupytext.read(SCRIPT).cells
STORY = [cell for cell in CELLS if "cellView" not in cell.metadata]
FOLDED = [cell for cell in CELLS if cell.metadata.get("jupyter", {}).get("source_hidden")]
RUN_CELLS = [cell.source for cell in CELLS if cell.cell_type == "code" and "__main__" in cell.source]
TREE = ast.parse(SCRIPT.read_text())
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]


def lines_before(text: str) -> int:
    """Unfolded lines up to and with the cell that holds a text."""
    (last,) = (number for number, cell in enumerate(CELLS) if text in cell.source and cell in STORY)
    return sum(len(cell.source.splitlines()) for cell in CELLS[: last + 1] if cell in STORY)


def test_the_story_comes_soon_and_is_short():
    assert lines_before("text = load_text(settings)") <= 90
    assert lines_before("layers, the first of them:") <= 300
    assert lines_before("print(try_head(") <= 450
    assert sum(len(cell.source.splitlines()) for cell in STORY) <= 1600


def test_cells_lines_and_functions_can_be_taken_in_at_a_glance():
    assert not [line for line in SCRIPT.read_text().splitlines() if len(line) > 120 and "# @param" not in line]
    assert not [cell.source[:80] for cell in CELLS if len(cell.source.splitlines()) > 60]
    assert not [node.name for node in FUNCTIONS if node.end_lineno - node.lineno >= 50]
    assert not [node.name for node in FUNCTIONS if len([arg for arg in node.args.args if arg.arg != "self"]) > 6]
    assert not [node for node in ast.walk(TREE) if isinstance(node, ast.Global)]


def test_folded_cells_say_what_they_offer():
    assert len(FOLDED) > 40
    for cell in FOLDED:
        assert cell.metadata["cellView"] == "form" and re.match(r"# @title \w.{5,}", cell.source), cell.source[:80]


@pytest.mark.parametrize(
    "word",
    (
        "rank_and_world from_all_processes fit_batch_size room_for_blocks autocast xla tqdm free_memory run.writes "
        "wait_for_all"
    ).split(),
)
def test_the_story_does_not_mention_the_machinery(word):
    code = "\n".join(cell.source for cell in STORY if cell.cell_type == "code")
    found = re.findall(rf"^.*\b{word}\b.*$", re.sub(r"#.*", "", code), re.M | re.I)
    assert not found


def test_a_run_cell_leaves_no_name_that_no_later_cell_uses():
    for number, source in enumerate(RUN_CELLS):
        bodies = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
        inner = {
            id(name)
            for body in bodies
            for loop in ast.walk(body)
            if isinstance(loop, ast.comprehension)
            for name in ast.walk(loop.target)
        }
        left = {
            name.id
            for body in bodies
            for name in ast.walk(body)
            if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store) and id(name) not in inner
        }
        later = {
            name.id
            for other in RUN_CELLS[number + 1 :]
            for name in ast.walk(ast.parse(other))
            if isinstance(name, ast.Name)
        }
        assert left <= later, left - later


def test_what_a_cell_runs_is_defined_above_it():
    """Through all functions that are called: a script defines nothing before its line is reached."""
    defined = {node.name: node for node in TREE.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    defined |= {
        name.id: node
        for node in TREE.body
        if isinstance(node, ast.Assign)
        for name in node.targets
        if isinstance(name, ast.Name)
    }
    for cell in TREE.body:
        if isinstance(cell, ast.If) and "__main__" in ast.unparse(cell.test):
            seen, todo = set(), [cell]
            while todo:
                used = {name.id for name in ast.walk(todo.pop()) if isinstance(name, ast.Name)} & defined.keys() - seen
                seen |= used
                todo += [defined[name] for name in used]
            assert not [name for name in seen if defined[name].lineno > cell.lineno], ast.unparse(cell)[:80]


def test_functions_that_take_or_give_tensors_say_their_shapes():
    silent = []
    for node in FUNCTIONS:
        notes = [arg.annotation for arg in node.args.args] + [node.returns]
        with_tensors = any(note is not None and "torch.Tensor" in ast.unparse(note) for note in notes)
        says = re.search(r"\([^)]*(,|n\)|heads\)|batch\))|state_dict", ast.get_docstring(node) or "")
        if node in TREE.body and with_tensors and not says:
            silent.append(node.name)
    assert not silent


def test_the_form_says_nothing_that_the_settings_do_not_know():
    (form,) = (cell.source for cell in CELLS if cell.source.startswith("# @title Settings\n"))
    rows = {name: (default, allowed) for group in nb.SETTINGS.values() for name, default, allowed, _ in group}
    fields = re.findall(r"^([A-Z_]+) = (.*?)  # @param (.*)$", form, re.M)
    assert len(fields) == 11 and fields[-1][0] == "MORE"
    for name, value, field in fields[:-1]:
        default, allowed = rows[name.lower()]
        assert ast.literal_eval(value) == default
        if field.startswith("["):
            choices = ast.literal_eval(field[: field.index("]") + 1])
            assert tuple(choices) == allowed if "allow-input" not in field else value.strip('"') in choices
