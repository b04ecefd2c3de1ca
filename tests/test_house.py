"""The house is as it was drawn: imports run one way, and no room outgrows its size.

    python tests/test_house.py [ROOT]      the table: lines, long lines, density, lazy imports, the trainer's attributes

    level 0   losses.py, parts/*.py        parts import losses and parts
    level 1   data.py, model.py            import parts; losses, data and model do not import one another
    level 2   extras/<room>/*.py           import all of these, and other rooms
    level 3   dpo.py                       imports all of these: it alone chooses
    level 4   extras/*.py (each a command), demo, bench, tests

No file imports one of a higher level, and files do not import in a circle: not inside a function either. One exception:
data.py and model.py may open a leaf of extras/ inside a function, and that leaf imports none of the core. A block
`if __name__ == "__main__":` is a command and may import what it likes.
"""

import ast
import io
import statistics
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE = ("losses.py", "data.py", "model.py", "dpo.py")
LEVELS = {"losses.py": 0, "data.py": 1, "model.py": 1, "dpo.py": 3}
PEERS = {"losses.py", "data.py", "model.py"}
FOLDERS = ("parts", "extras", "demo", "bench", "tests")
TOGETHER, LARGEST, WIDTH, LONGEST, MEDIAN, ATTRIBUTES = 2300, 700, 100, 50, 10, 25
MAY_BE_LONG = {"train", "main"}


# Who imports whom


class Import(NamedTuple):
    source: str  # the importing file, from the root
    line: int
    target: str  # the imported file, from the root
    lazy: bool  # inside a function

    @property
    def place(self) -> str:
        return f"{self.source}:{self.line}"


def files_of(root: Path) -> list[str]:
    """Every Python file of the repository, from its root."""
    found = [root / name for name in CORE] + [p for folder in FOLDERS for p in (root / folder).rglob("*.py")]
    return sorted(p.relative_to(root).as_posix() for p in found if p.is_file() and "__pycache__" not in p.parts)


def level(file: str) -> int:
    if file in LEVELS:
        return LEVELS[file]
    folder, *rest = file.split("/")
    return 0 if folder == "parts" else 2 if folder == "extras" and len(rest) > 1 else 4


def room_of(file: str) -> str:
    return {0: "losses and parts", 1: "data and model", 2: "the rooms of extras", 3: "dpo.py", 4: "commands"}[level(file)]


def parse(root: Path, file: str) -> ast.Module:
    return ast.parse((root / file).read_text(encoding="utf-8"), file)


def is_main_block(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", "'__main__' == __name__")


def walk(tree: ast.Module) -> Iterator[tuple[ast.AST, bool]]:
    """Every node but those of `if __name__ == "__main__":`, and whether it stands inside a function."""
    waiting: list[tuple[ast.AST, bool]] = [(tree, False)]
    while waiting:
        parent, lazy = waiting.pop()
        inside = lazy or isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(parent):
            if not is_main_block(child):
                yield child, inside
                waiting.append((child, inside))


def names_imported(node: ast.AST, file: str) -> list[str]:
    """Dotted names that a node imports: of `from a import b`, a.b (and a, where b is no module)."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        above = file.split("/")[: -node.level] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        return [f"{base}.{alias.name}" if base else alias.name for alias in node.names]
    called = isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__")
    if called and node.args and isinstance(node.args[0], ast.Constant):
        return [str(node.args[0].value)]
    return []


def find_file(dotted: str, files: set[str]) -> str | None:
    """The file that has a module of that name, or the name in it; tests import their neighbours by bare names."""
    parts = dotted.split(".")
    for words in (parts, parts[:-1]):
        path = "/".join(words)
        for file in (f"{path}.py", f"{path}/__init__.py", f"tests/{path}.py"):
            if words and file in files:
                return file
    return None


def imports_of(root: Path) -> list[Import]:
    files, found = files_of(root), []
    known = set(files)
    for file in files:
        for node, lazy in walk(parse(root, file)):
            targets = (find_file(name, known) for name in names_imported(node, file))
            found += [Import(file, node.lineno, target, lazy) for target in targets if target not in (None, file)]
    return list(dict.fromkeys(found))  # two names of one module are one import


def wrong_arrows(root: Path) -> list[str]:
    """What is against the levels: `file:line imports file, ...`."""
    found = imports_of(root)
    out = []
    for i in found:
        arrow = f"{i.place} imports {i.target}"
        leaf = level(i.source) == 1 and level(i.target) == 2
        if {i.source, i.target} <= PEERS:
            out.append(f"{arrow}: losses, data and model do not import one another")
        elif leaf and i.lazy:
            out += [f"{arrow}, a leaf, and that imports {core} ({where})" for core, where in core_reached(i.target, found)]
        elif level(i.target) > level(i.source):
            out.append(f"{arrow}: {room_of(i.source)} do not know of {room_of(i.target)}")
    return out


def core_reached(leaf: str, found: list[Import]) -> list[tuple[str, str]]:
    """(core file, file:line of its import) that a leaf of extras/ imports, itself or through others of extras/."""
    seen, waiting, out = {leaf}, [leaf], []
    while waiting:
        file = waiting.pop()
        for i in found:
            if i.source != file:
                continue
            if i.target in CORE:
                out.append((i.target, i.place))
            elif i.target.startswith("extras/") and i.target not in seen:
                seen.add(i.target)
                waiting.append(i.target)
    return out


def circles(root: Path) -> list[str]:
    """Each way round of files that import one another, told once."""
    edges: dict[str, dict[str, Import]] = {}
    for i in imports_of(root):
        edges.setdefault(i.source, {}).setdefault(i.target, i)
    out, done = [], set()

    def visit(file: str, path: list[str]) -> None:
        if file in path:
            ring = path[path.index(file):]
            first = ring.index(min(ring))
            ring = ring[first:] + ring[:first]
            steps = [edges[a][b].place for a, b in zip(ring, [*ring[1:], ring[0]])]
            out.append(" -> ".join([*steps, ring[0]]))
        elif file not in done:
            for target in edges.get(file, ()):
                visit(target, [*path, file])
            done.add(file)

    for file in sorted(edges):
        visit(file, [])
    return out


def files_that_are_no_commands(root: Path) -> list[str]:
    direct = [file for file in files_of(root) if file.startswith("extras/") and file.count("/") == 1]
    return [f"{file}:1 is directly in extras/ and no command: it has no `if __name__ == \"__main__\":`; a room is a folder"
            for file in direct if not any(map(is_main_block, parse(root, file).body))]


# Sizes


class Function(NamedTuple):
    place: str
    name: str
    lines: int


def lines_of(root: Path, file: str) -> list[str]:
    return (root / file).read_text(encoding="utf-8").splitlines()


def core_files(root: Path) -> list[str]:
    return [file for file in CORE if (root / file).is_file()]


def functions_of(root: Path, file: str) -> list[Function]:
    nodes = (n for n in ast.walk(parse(root, file)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))
    return [Function(f"{file}:{n.lineno}", n.name, n.end_lineno - n.lineno + 1) for n in nodes]


def too_large(root: Path) -> list[str]:
    """What of the core is over its size."""
    files = core_files(root)
    lines = {file: lines_of(root, file) for file in files}
    out = [f"{file}:{len(lines[file])} lines, at most {LARGEST}" for file in files if len(lines[file]) > LARGEST]
    total = sum(map(len, lines.values()))
    if total > TOGETHER:
        out.append(f"{' '.join(files)}: {total} lines together, at most {TOGETHER}")
    out += [f"{file}:{n} has {len(line)} columns, at most {WIDTH}"
            for file in files for n, line in enumerate(lines[file], 1) if len(line) > WIDTH]
    functions = [f for file in files for f in functions_of(root, file)]
    out += [f"{f.place} {f.name} has {f.lines} lines, at most {LONGEST}"
            for f in functions if f.lines > LONGEST and f.name not in MAY_BE_LONG]
    median = statistics.median(f.lines for f in functions) if functions else 0
    if median >= MEDIAN:
        out.append(f"{' '.join(files)}: a function has {median:g} lines in the median, it should be below {MEDIAN}")
    return out


# The trainer's attributes


def targets_of(node: ast.AST) -> list[ast.AST]:
    """What a statement assigns to, tuples taken apart."""
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign, ast.For, ast.NamedExpr)):
        targets = [node.target]
    elif isinstance(node, ast.With):
        targets = [item.optional_vars for item in node.items if item.optional_vars]
    elif isinstance(node, ast.Delete):
        targets = node.targets
    else:
        return []
    return [part for target in targets for part in taken_apart(target)]


def taken_apart(target: ast.AST) -> list[ast.AST]:
    """The names and attributes in a target; of an entry, what it is an entry of."""
    if isinstance(target, (ast.Tuple, ast.List)):
        return [part for element in target.elts for part in taken_apart(element)]
    return taken_apart(target.value) if isinstance(target, (ast.Starred, ast.Subscript)) else [target]


def attributes_set(node: ast.AST, owner: str) -> list[tuple[int, str]]:
    """(line, x) of each `owner.x = ...`, `owner.x[...] = ...` or `setattr(owner, "x", ...)` within a node."""
    found = []
    for n in ast.walk(node):
        found += [(t.lineno, t.attr) for t in targets_of(n) if isinstance(t, ast.Attribute) and ast.unparse(t.value) == owner]
        if isinstance(n, ast.Call) and ast.unparse(n.func) == "setattr" and n.args and ast.unparse(n.args[0]) == owner:
            found.append((n.lineno, ast.unparse(n.args[1])))
    return found


def trainer_attributes(root: Path) -> dict[str, int]:
    """{x: line where it is first set} of DPOTrainer's `self.x = ...`."""
    found: dict[str, int] = {}
    for node in parse(root, "dpo.py").body if (root / "dpo.py").is_file() else []:
        if isinstance(node, ast.ClassDef) and node.name == "DPOTrainer":
            for line, name in attributes_set(node, "self"):
                found.setdefault(name, line)
    return found


def set_from_outside(root: Path) -> list[str]:
    files = [f for f in files_of(root) if f == "dpo.py" or f.startswith(("parts/", "extras/"))]
    return [f"{file}:{line} sets trainer.{name} from outside"
            for file in files for line, name in attributes_set(parse(root, file), "trainer")]


# The house as it is


def told(findings: list[str]) -> str:
    return f"{len(findings)} found\n" + "\n".join(findings)


def test_imports_run_one_way():
    found = wrong_arrows(ROOT)
    assert not found, told(found)


def test_there_is_no_circle():
    found = circles(ROOT)
    assert not found, told(found)


def test_a_file_in_extras_is_a_command():
    found = files_that_are_no_commands(ROOT)
    assert not found, told(found)


def test_the_core_keeps_its_size():
    found = too_large(ROOT)
    assert not found, told(found)


def test_the_trainer_has_few_attributes_and_sets_them_itself():
    found = trainer_attributes(ROOT)
    assert len(found) <= ATTRIBUTES, f"{len(found)} attributes, at most {ATTRIBUTES}: {' '.join(found)}"
    outside = set_from_outside(ROOT)
    assert not outside, told(outside)


# Each check fails where it should: a small house, broken on purpose

COMMAND = 'import dpo\n\nif __name__ == "__main__":\n    print(dpo)\n'
SOUND = {
    "losses.py": "import math\n\n\ndef sigmoid(x):\n    return math.exp(x)\n",
    "data.py": "from parts import rows\n\n\ndef load(many):\n    if many:\n        from extras.rows import workers\n\n"
               "        return workers.run\n    return rows\n\n\nif __name__ == \"__main__\":\n    from extras import view\n\n    view.main()\n",
    "model.py": "import torch\n\nimport parts.names as names\n\n\nclass Decoder(torch.nn.Module):\n    names = names\n",
    "dpo.py": "import data\nimport losses\nfrom model import Decoder\nfrom parts.rows import read\nfrom extras.lora import kinds\n\n\n"
              "class DPOTrainer:\n    def train(self):\n        self.step, self.model = 0, Decoder\n        self.step += 1\n"
              "        return data, losses, read, kinds\n",
    "parts/rows.py": "from losses import sigmoid\nfrom parts import names\n\n\ndef read():\n    return sigmoid, names\n",
    "parts/names.py": "import json  # noqa\n",
    "extras/rows/workers.py": "from parts.names import json\n\nrun = json\n",
    "extras/lora/kinds.py": "import losses\nimport model\nfrom extras.rows import workers\n\nall = losses, model, workers\n",
    "extras/view.py": COMMAND,
    "extras/chat.py": COMMAND,
    "tests/conftest.py": "import dpo\n",
    "tests/test_it.py": "from conftest import dpo\nfrom extras.view import dpo as same\n",
    "bench/speed.py": "import extras.chat\n",
}


@pytest.fixture
def house(tmp_path):
    """house(**{file: its text}): findings of every check, in the sound house with these files instead."""

    def build(**changed) -> list[str]:
        for name, text in (SOUND | changed).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        checks = (wrong_arrows, circles, files_that_are_no_commands, too_large, set_from_outside)
        return [line for check in checks for line in check(tmp_path)]

    return build


def lazily(statement: str, name: str = "later") -> str:
    return f"\n\ndef {name}():\n    {statement}\n"


BROKEN = {
    "parts know no rooms": ("parts/names.py", "import extras.lora.kinds\n", "parts/names.py:1 imports extras/lora/kinds.py: losses"),
    "not lazily either": ("parts/names.py", lazily("from extras.lora import kinds"), "parts/names.py:4 imports extras/lora/kinds.py: losses"),
    "parts know no data": ("parts/names.py", "from data import load\n", "parts/names.py:1 imports data.py: losses and parts"),
    "a room knows no trainer": ("extras/lora/kinds.py", "import dpo\n", "extras/lora/kinds.py:1 imports dpo.py"),
    "a room knows no command": ("extras/lora/kinds.py", lazily("from extras.chat import dpo"), ":4 imports extras/chat.py"),
    "dpo knows no command": ("dpo.py", lazily("from extras import chat"), "dpo.py:4 imports extras/chat.py"),
    "dpo knows no demo": ("dpo.py", "import tests.conftest\n", "dpo.py:1 imports tests/conftest.py"),
    "relative imports count": ("extras/lora/kinds.py", "from ..chat import dpo\n", ":1 imports extras/chat.py"),
    "imports by name count": ("parts/names.py", "import importlib\n\nimportlib.import_module('data')\n", "parts/names.py:3 imports data.py"),
    "losses know no data": ("losses.py", "import data\n", "losses.py:1 imports data.py: losses, data and model"),
    "model knows no losses": ("model.py", lazily("from losses import sigmoid"), "model.py:4 imports losses.py: losses, data and model"),
    "data knows no model": ("data.py", "import model as models\n", "data.py:1 imports model.py: losses, data and model"),
    "no room at the top of data": ("data.py", "from extras.rows import workers\n", "data.py:1 imports extras/rows/workers.py: data and"),
    "a leaf knows no core": ("extras/rows/workers.py", "import data\n", "a leaf, and that imports data.py (extras/rows/workers.py:1)"),
    "a leaf's leaf neither": ("extras/rows/workers.py", "import extras.lora.kinds\n", "a leaf, and that imports model.py (extras/lora/kinds.py:2)"),
    "a circle": ("parts/names.py", "import parts.rows\n", "parts/names.py:1 -> parts/rows.py:2 -> parts/names.py"),
    "a lazy circle": ("parts/names.py", lazily("from parts.rows import read"), "parts/names.py:4 -> parts/rows.py:2 -> parts/names.py"),
    "no command": ("extras/chat.py", "import dpo\n", "extras/chat.py:1 is directly in extras/"),
    "too many lines": ("model.py", "x = 1\n" * 701, "model.py:701 lines, at most 700"),
    "a long line": ("data.py", f"x = 1\ny = {'1' * 97}\n", "data.py:2 has 101 columns"),
    "a long function": ("data.py", "def load():\n" + "    x = 1\n" * 50, "data.py:1 load has 51 lines"),
    "long functions": ("data.py", "".join(f"def f{i}():\n" + "    x = 1\n" * 10 for i in range(9)), "has 11 lines in the median"),
    "set from outside": ("extras/lora/kinds.py", "def f(trainer):\n    trainer.lora = 1\n", "extras/lora/kinds.py:2 sets trainer.lora"),
    "in a tuple": ("parts/names.py", "def f(trainer):\n    a, (trainer.b, c) = 1, (2, 3)\n", "parts/names.py:2 sets trainer.b"),
    "an entry of it": ("dpo.py", "def f(trainer):\n    trainer.options['x'] += 1\n", "dpo.py:2 sets trainer.options"),
    "by setattr": ("parts/names.py", "def f(trainer):\n    setattr(trainer, 'x', 1)\n", "parts/names.py:2 sets trainer.'x'"),
}


def test_a_sound_house_has_no_findings(house, tmp_path):
    assert house() == []
    assert trainer_attributes(tmp_path) == {"step": 10, "model": 10}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named_with_file_and_line(house, name):
    file, text, words = BROKEN[name]
    found = house(**{file: text})
    assert any(words in line for line in found), told(found)


def test_all_together_may_be_too_many(house):
    found = house(**{file: "x = 1\n" * 576 for file in CORE})
    assert found == ["losses.py data.py model.py dpo.py: 2304 lines together, at most 2300"]


def test_long_functions_are_left_to_train_and_main(house):
    assert house(**{"dpo.py": "def train():\n" + "    x = 1\n" * 60}) == []


def test_the_trainers_attributes_are_counted_in_every_kind_of_assignment(tmp_path):
    body = ["self.a: int = 1", "self.b += 1", "(self.c, [self.d, *self.e]) = 1, [2]", "for self.f in (): pass", "self.g[0] = 1",
            "with open('x') as self.h: pass", "x.i = 1", "self.j.k = 1", "self.a = 2"]
    (tmp_path / "dpo.py").write_text("class DPOTrainer:\n    def f(self, x):\n" + "".join(f"        {b}\n" for b in body))
    assert set(trainer_attributes(tmp_path)) == set("abcdefgh")


# The table


def code_lines(text: str) -> tuple[set[int], set[int]]:
    """(lines with code, lines with a comment); docstrings and blank lines are neither."""
    quiet = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    code: set[int] = set()
    comments: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in quiet:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            code -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return code, comments


def density(text: str) -> tuple[float, float]:
    """(syntax nodes, without those that only say load or store, per line of code; comment lines per 100 of code)."""
    code, comments = code_lines(text)
    nodes = sum(not isinstance(n, ast.expr_context) for n in ast.walk(ast.parse(text)))
    return nodes / max(len(code), 1), 100 * len(comments) / max(len(code), 1)


def row(root: Path, name: str, files: list[str], found: list[Import]) -> str:
    text = "\n".join("\n".join(lines_of(root, file)) for file in files)
    lines = [line for file in files for line in lines_of(root, file)]
    sizes = [f.lines for file in files for f in functions_of(root, file)] or [0]
    lazy = [i for i in found if i.source in files and i.lazy]
    upward = sum(level(i.target) > level(i.source) for i in lazy)
    nodes, comments = density(text)
    return (f"{name:22} {len(files):5} {len(lines):6} {sum(len(line) > WIDTH for line in lines):6} {nodes:7.1f} {comments:9.0f} "
            f"{statistics.median(sizes):7g} {max(sizes):8} {len(lazy):6} {upward:7}")


def table(root: Path) -> str:
    files, found = files_of(root), imports_of(root)
    rooms = {file: [file] for file in core_files(root)} | {"the core": core_files(root)}
    for name, chosen in (("parts/", "parts/"), ("extras/<room>/", "extras/"), ("extras/ commands", "extras/"), ("demo/", "demo/"),
                         ("bench/", "bench/"), ("tests/", "tests/")):
        rooms[name] = [f for f in files if f.startswith(chosen) and (chosen != "extras/" or (level(f) == 2) == ("room" in name))]
    head = (f"{'':22} {'files':>5} {'lines':>6} {'>100':>6} {'nodes/l':>7} {'comm./100':>9} {'median':>7} {'longest':>8} {'lazy':>6} "
            f"{'upward':>7}")
    body = [row(root, name, members, found) for name, members in rooms.items() if members]
    attributes, outside = trainer_attributes(root), set_from_outside(root)
    counts = (f"wrong arrows {len(wrong_arrows(root))}, circles {len(circles(root))}, files in extras/ that are no command "
              f"{len(files_that_are_no_commands(root))}; DPOTrainer: {len(attributes)} attributes, {len(outside)} set from outside")
    return "\n".join([head, *body, counts])


if __name__ == "__main__":
    print(table(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT))
