"""docs/map.md: what it names exists, and it names every file of parts/, every room and every command. So do the other pages."""

import ast
import re

import pytest
from conftest import ROOT

TEXT = (ROOT / "docs" / "map.md").read_text("utf-8")
NAMED = sorted(set(re.findall(r"`([\w./]+\.py):([\w.]+)`", TEXT)))
PAGES = [ROOT / "README.md", ROOT / "tests" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]  # CHANGELOG.md tells old names
PLACES = sorted(set(re.findall(r"`((?:\w+/)+\w+\.\w+|(?:losses|data|model|dpo)\.py)`", TEXT)))


def section(title: str) -> str:
    """The page's text under a heading, up to the next one."""
    return re.split(r"^#+ ", TEXT.split(f"# {title}\n", 1)[1], flags=re.M)[0]


def names_in(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """{name: statement} of the functions, classes and constants that a body defines."""
    found: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    return found


def defines(file: str, dotted: str) -> bool:
    """Whether a file defines a name; of `A.b`, the class A with b in it."""
    body = ast.parse((ROOT / file).read_text("utf-8")).body
    for name in dotted.split("."):
        node = names_in(body).get(name)
        if node is None:
            return False
        body = node.body if isinstance(node, ast.ClassDef) else []
    return True


def test_the_page_names_functions_and_files():
    assert len(NAMED) > 60 and len(PLACES) > 5
    assert {file for file, _ in NAMED} >= {"losses.py", "data.py", "model.py", "dpo.py"}


@pytest.mark.parametrize("file,name", NAMED, ids=[f"{file}:{name}" for file, name in NAMED])
def test_every_file_and_function_named_exists(file, name):
    assert (ROOT / file).is_file() and defines(file, name)


def test_a_name_that_is_not_there_is_noticed():
    assert defines("dpo.py", "DPOTrainer.train_step") and defines("parts/families.py", "FAMILIES")
    assert not defines("dpo.py", "DPOTrainer.no_such") and not defines("losses.py", "sigmoid.no_such")


def test_every_file_named_exists():
    assert [place for place in PLACES if not (ROOT / place).is_file()] == []


def test_every_file_of_parts_is_on_the_page_once():
    named = re.findall(r"`(\w+\.py)`", section("parts/"))
    assert sorted(named) == sorted(path.name for path in (ROOT / "parts").glob("*.py"))


def test_every_room_and_every_command_is_on_the_page_once():
    rooms = [path.name for path in (ROOT / "extras").iterdir() if any(path.glob("*.py"))]
    commands = [path.name for path in (ROOT / "extras").glob("*.py")]
    text = section("extras/")
    assert sorted(re.findall(r"`(\w+)/`", text)) == sorted(rooms)
    assert sorted(re.findall(r"`(\w+\.py)`", text)) == sorted(commands)


def find_module(dotted: str) -> tuple[str, str]:
    """(file, name in it) of `extras.models.opening.load_adapter`; the name is empty for a module, the file for neither."""
    words = dotted.split(".")
    for count in range(len(words), 0, -1):
        file = "/".join(words[:count]) + ".py"
        if (ROOT / file).is_file():
            return file, ".".join(words[count:])
    return "", dotted


def offers(file: str, name: str) -> bool:
    """Whether a program can import a name from a file, which defines it or imports it itself, as dpo.py does DPOConfig."""
    body = ast.parse((ROOT / file).read_text("utf-8")).body
    imported = {alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names}
    return name in imported or defines(file, name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_module_and_function_that_a_page_names_exists(page):
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
    dotted = re.findall(r"(?:`|python -m )((?:losses|data|model|dpo|parts|extras|demo)(?:\.[A-Za-z_]\w*)+)", text)
    found = {name: find_module(name) for name in dotted if not name.endswith((".py", ".NAME"))}
    assert [name for name, (file, inside) in found.items() if not file or inside and not offers(file, inside)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_file_that_a_page_names_exists(page):
    named = set(re.findall(r"`((?:docs|tests|bench|demo|extras|parts)/[\w./-]*)[`:]", page.read_text("utf-8")))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
