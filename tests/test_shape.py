"""The house: the story is short and open, the machinery is folded, and a cell can be taken in at a glance."""

import ast
import dataclasses
import re
import typing

import jupytext
from conftest import SCRIPT

import PruningAndFineTuningColab as nb

TOTAL, FOLDED = 3952, 2637  # lines of the script, and lines of its folded code cells: at most

CELLS = jupytext.read(SCRIPT).cells
STORY = [cell for cell in CELLS if "cellView" not in cell.metadata]
HIDDEN = [cell for cell in CELLS if cell.metadata.get("jupyter", {}).get("source_hidden")]
RUN_CELLS = [cell.source for cell in CELLS if cell.cell_type == "code" and "__main__" in cell.source]
TREE = ast.parse(SCRIPT.read_text())
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]


def lines_of(cells) -> int:
    return sum(len(cell.source.splitlines()) for cell in cells)


def place_in_story(text: str) -> int:
    """The number of the one unfolded cell that holds a text."""
    (number,) = (number for number, cell in enumerate(CELLS) if text in cell.source and cell in STORY)
    return number


def lines_before(text: str) -> int:
    """Unfolded lines up to and with the cell that holds a text."""
    return lines_of(cell for cell in CELLS[: place_in_story(text) + 1] if cell in STORY)


def test_the_whole_is_no_longer_than_it_was_and_the_story_comes_soon():
    assert len(SCRIPT.read_text().splitlines()) <= TOTAL
    assert lines_of(HIDDEN) <= FOLDED
    assert lines_before("text = load_text(settings)") <= 90
    assert lines_before("layers, the first of them:") <= 300
    assert lines_before("print(try_head(") <= 450
    assert lines_of(STORY) <= 1600


def test_nothing_is_folded_between_the_start_and_the_heads():
    start, heads = (next(n for n, cell in enumerate(CELLS) if f"\n## {title}" in cell.source)
                    for title in ("3. Start", "6. Heads"))  # fmt: skip
    assert not [cell.source[:80] for cell in CELLS[start:heads] if cell in HIDDEN]


def test_a_head_is_closed_before_anything_is_said_of_cutting():
    cutting = (n for n, cell in enumerate(CELLS) if re.search(r"Cutting|def cut(_heads|_neurons)?\(", cell.source))
    assert place_in_story("print(try_head(") < next(cutting)


def test_llama_cpp_is_told_of_in_the_last_section_only():
    section, told = 0, []
    for cell in CELLS:
        if cell.cell_type == "markdown":
            section = int((re.search(r"^## (\d+)\.", cell.source, re.M) or [0, section])[1])
            told += [section] * bool(section and re.search(r"GGUF|llama\.cpp", cell.source))
    assert section >= 16 and set(told) == {section}


def test_cells_lines_and_functions_can_be_taken_in_at_a_glance():
    assert not [line for line in SCRIPT.read_text().splitlines() if len(line) > 120 and "# @param" not in line]
    assert not [cell.source[:80] for cell in CELLS if len(cell.source.splitlines()) > 60]
    assert not [node.name for node in FUNCTIONS if node.end_lineno - node.lineno >= 50]
    assert not [node.name for node in FUNCTIONS if len([arg for arg in node.args.args if arg.arg != "self"]) > 6]
    assert not [node for node in ast.walk(TREE) if isinstance(node, ast.Global)]
    assert len(HIDDEN) > 40, "folded cells say what they offer"
    for cell in HIDDEN:
        assert cell.metadata["cellView"] == "form" and re.match(r"# @title \w.{5,}", cell.source), cell.source[:80]


MACHINERY = "PartialState fit_batch_size autocast xla tqdm clear_device_cache".split()


def test_the_story_does_not_mention_the_machinery():
    code = "\n".join(re.sub(r"#.*", "", cell.source) for cell in STORY if cell.cell_type == "code")
    for word in MACHINERY:
        assert re.search(rf"\b{word}\b", SCRIPT.read_text()), f"{word} has another name now"
    found = [line for line in code.splitlines() if re.search(rf"\b({'|'.join(MACHINERY)})\b", line, re.I)]
    assert not found


def names_in(node, context=ast.Name) -> list[ast.Name]:
    """The names in a piece of code; with ast.Store or ast.Load those that it sets or reads."""
    names = [name for name in ast.walk(node) if isinstance(name, ast.Name)]
    return [name for name in names if context is ast.Name or isinstance(name.ctx, context)]


def test_a_run_cell_leaves_no_name_that_no_later_cell_uses():
    for number, source in enumerate(RUN_CELLS):
        bodies = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
        loops = [loop for body in bodies for loop in ast.walk(body) if isinstance(loop, ast.comprehension)]
        inner = {id(name) for loop in loops for name in names_in(loop.target)}
        left = {name.id for body in bodies for name in names_in(body, ast.Store) if id(name) not in inner}
        later = {name.id for other in RUN_CELLS[number + 1 :] for name in names_in(ast.parse(other))}
        assert left <= later, left - later


def test_what_a_cell_runs_is_defined_above_it():
    """Through all functions that are called: a script or a notebook defines nothing before its line is reached."""
    defined = {node.name: node for node in TREE.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assigned = [node for node in TREE.body if isinstance(node, ast.Assign)]
    defined |= {name.id: node for node in assigned for target in node.targets for name in names_in(target)}
    runs = [node for node in TREE.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
    assert len(runs) > 15 and len(defined) > 100
    for cell in runs:
        seen, todo = set(), [cell]
        while todo:
            node = todo.pop()
            own = {name.id for name in names_in(node, ast.Store)}  # fields and variables, and arguments
            own |= {part.arg for part in ast.walk(node) if isinstance(part, ast.arg)}
            used = {name.id for name in names_in(node)} & defined.keys() - seen - (own if node is not cell else set())
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
    known = {field.name: field for field in dataclasses.fields(nb.Settings)}
    assert len(known) <= 32
    fields = re.findall(r"^([A-Z_]+) = (.*?)  # @param (.*)$", form, re.M)
    assert len(fields) == 10 and fields[-1][0] == "MORE"
    for name, value, shown in fields[:-1]:
        field, value, form_kind = known[name.lower()], ast.literal_eval(value), re.search(r"\{(.*)\}", shown)
        assert field.default == value
        if shown.startswith("["):
            choices = ast.literal_eval(shown[: shown.index("]") + 1])
            assert value in choices and all(nb.Settings(**{field.name: choice}) for choice in choices)
            if "allow-input" not in shown:
                assert tuple(choices) == typing.get_args(field.type)
        elif "slider" in shown:
            low, high = (float(re.search(rf"{end}: ([\d.]+)", form_kind[1])[1]) for end in ("min", "max"))
            assert low <= value <= high and all(nb.Settings(**{field.name: end}) for end in (low, high))
        else:
            assert {"boolean": bool, "string": str}[re.search(r'type: "(\w+)"', shown)[1]] is field.type
