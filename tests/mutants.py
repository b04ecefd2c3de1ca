"""Break losses.py, or parts/loss_checks.py, in one place at a time and see that its tests notice.

    python tests/mutants.py             # every mutant against the tests; exit status 1 if one survives
    python tests/mutants.py --list      # only name them
    python tests/mutants.py sppo_hard   # those of one function

A mutant flips a sign, drops a term or a factor, swaps chosen and rejected, moves a constant, turns a comparison or a
condition, leaves out a function, or negates its argument. It is caught when a golden case (values or gradients, 1e-9 in
float64) or a test of tests/test_losses.py fails on it. `EQUIVALENT` lists those that cannot be told apart, and why.
"""

import ast
import copy
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parent
SOURCES = {name: TESTS.parent / f"{name.replace('.', '/')}.py" for name in ("losses", "parts.loss_checks")}
sys.path[:0] = [str(path) for path in (TESTS, TESTS.parent) if str(path) not in sys.path]

import conformance  # noqa: E402
import test_losses  # noqa: E402

import losses  # noqa: E402
from parts import loss_checks  # noqa: E402

SHAPE = "only the shape and type of the argument are read"
EQUIVALENT = {
    "pair_losses: torch.zeros_like(x.policy_chosen_logps) -> torch.zeros_like(-x.policy_chosen_logps)": SHAPE,
    "pair_losses: x.policy_chosen_logps -> x.policy_rejected_logps": SHAPE,
}


class Mutant(NamedTuple):
    name: str  # function: before -> after
    function: str
    tree: ast.Module
    module: str = "losses"  # which file is broken


# What is done to a node


def swapped(word: str) -> str:
    return word.replace("chosen", "\0").replace("rejected", "chosen").replace("\0", "rejected")


def negated(node: ast.expr) -> ast.expr:
    return ast.UnaryOp(ast.USub(), node)


def binary(node: ast.BinOp) -> list[ast.expr]:
    """The opposite operation, and each operand alone."""
    opposite = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}.get(type(node.op))
    out = [ast.BinOp(node.left, opposite(), node.right)] if opposite else []
    right = {ast.Sub: [negated(node.right)], ast.Add: [node.right], ast.Mult: [node.right]}
    return [*out, node.left, *right.get(type(node.op), [])]


def call(node: ast.Call) -> list[ast.expr]:
    """Without the function (a method: its object alone), and with its first argument negated."""
    if not isinstance(node.func, ast.Attribute):
        return []
    of_module = isinstance(node.func.value, ast.Name) and node.func.value.id in ("torch", "F", "math")
    if not of_module:
        methods = ("clamp", "log", "expand", "sort", "repeat_interleave", "reshape")
        return [node.func.value] if node.func.attr in methods else []
    return [node.args[0], ast.Call(node.func, [negated(node.args[0])], node.keywords)] if len(node.args) == 1 else []


def attribute(node: ast.Attribute) -> list[ast.expr]:
    """Its chosen or rejected twin; what a sort would have sorted; the other extreme, mean or sum."""
    others = {"min": "max", "max": "min", "mean": "sum", "expm1": "exp", "log1p": "log", "cumsum": "cumprod"}
    name = swapped(node.attr) if swapped(node.attr) != node.attr else others.get(node.attr)
    out = [ast.Attribute(node.value, name, node.ctx)] if name else []
    sorts = node.attr == "values" and ast.unparse(node.value).endswith(".sort()")
    return out + ([node.value.func.value] if sorts else [])


def comparison(node: ast.Compare) -> list[ast.expr]:
    """Each comparison turned, and moved by its boundary."""
    other = {ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is], ast.In: [ast.NotIn],
             ast.NotIn: [ast.In], ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.LtE],
             ast.GtE: [ast.Gt, ast.Lt]}
    out = []
    for i, op in enumerate(node.ops):
        turned = (node.ops[:i] + [new()] + node.ops[i + 1 :] for new in other[type(op)])
        out += [ast.Compare(node.left, ops, node.comparators) for ops in turned]
    return out


def constant(node: ast.Constant) -> list[ast.expr]:
    if isinstance(node.value, bool):
        return [ast.Constant(not node.value)]
    if isinstance(node.value, (int, float)):
        return [ast.Constant(node.value + 1)]
    if isinstance(node.value, str) and swapped(node.value) != node.value:
        return [ast.Constant(swapped(node.value))]
    return []


def replacements(node: ast.AST) -> list[ast.AST]:
    """Every mutation of one node, its children left alone."""
    if isinstance(node, ast.Name):
        read = isinstance(node.ctx, ast.Load) and swapped(node.id) != node.id
        return [ast.Name(swapped(node.id), node.ctx)] if read else []
    if isinstance(node, ast.UnaryOp):
        return [node.operand]
    if isinstance(node, ast.IfExp):
        return [node.body, node.orelse]
    if isinstance(node, ast.BoolOp):
        return list(node.values)
    if isinstance(node, ast.FunctionDef):
        no_grad = [ast.unparse(decorator) for decorator in node.decorator_list] == ["torch.no_grad()"]
        return [without_decorators(node)] if no_grad else []
    by_kind = {ast.BinOp: binary, ast.Call: call, ast.Attribute: attribute, ast.Compare: comparison}
    return (by_kind | {ast.Constant: constant}).get(type(node), lambda _: [])(node)


def without_decorators(node: ast.FunctionDef) -> ast.FunctionDef:
    bare = copy.copy(node)
    bare.decorator_list = []
    return bare


# Every mutant of the files


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def places(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """The nodes of a function's body that may be changed: no docstring, no annotation, no text of a message."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    texts = [node for node in ast.walk(function) if isinstance(node, (ast.JoinedStr, ast.Raise))]
    messages = {id(part) for node in texts for part in ast.walk(node)}
    yield function
    yield from (node for statement in body for node in ast.walk(statement) if id(node) not in messages)


def find_mutants() -> list[Mutant]:
    return [mutant for module in SOURCES for mutant in mutants_of(module)]


def mutants_of(module: str) -> list[Mutant]:
    tree, mutants = parse(module), {}
    for function in functions(tree):
        for node in places(function):
            for new in replacements(node):
                mutant = Mutant(describe(function, node, new), function.name, with_replaced(tree, node, new), module)
                mutants.setdefault(ast.unparse(mutant.tree), mutant)  # two ways to the same text are one
    return list(mutants.values())


def parse(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text(encoding="utf-8"))


def describe(function: ast.FunctionDef, old: ast.AST, new: ast.AST) -> str:
    if isinstance(old, ast.FunctionDef):
        return f"{function.name}: without torch.no_grad"
    return f"{function.name}: {ast.unparse(old)} -> {ast.unparse(new)}"


def with_replaced(tree: ast.Module, old: ast.AST, new: ast.AST) -> ast.Module:
    """A copy of the tree with `new` where `old` is."""

    def copied(node):
        if node is old:
            return copy.deepcopy(new)
        if isinstance(node, list):
            return [copied(part) for part in node]
        if not isinstance(node, ast.AST):
            return node
        twin = type(node)(**{name: copied(value) for name, value in ast.iter_fields(node)})
        return ast.copy_location(twin, node)

    return ast.fix_missing_locations(copied(tree))


# Judging one


def load(mutant: Mutant) -> list[types.ModuleType]:
    """losses and the checks that import it, one of them broken."""
    modules = []
    for name, source in SOURCES.items():
        module = types.ModuleType(name)
        # NamedTuple looks its module up; conformance, test_losses and the checks import losses by name
        sys.modules[name] = module
        tree = mutant.tree if name == mutant.module else parse(name)
        exec(compile(tree, str(source), "exec"), module.__dict__)
        modules.append(module)
    return modules


def golden_fails(case: dict) -> bool:
    return not conformance.case_difference(case, *conformance.ours(case)) < 1e-9


def unit_tests() -> Iterator[tuple[str, Callable]]:
    """The tests of test_losses.py, one call for each value of their parameter."""
    for name, test in vars(test_losses).items():
        if not name.startswith("test_"):
            continue
        if not hasattr(test, "pytestmark"):
            yield name, test
            continue
        names, values = test.pytestmark[0].args
        for value in values:
            yield name, partial(test, *(value if "," in names else [value]))


def all_tests(function: str) -> Iterator[tuple[str, Callable]]:
    """(name, call); the call raises, or is true, where a test fails."""
    yield from unit_tests()
    yield from ((case["name"], partial(golden_fails, case)) for case in ordered_cases(function))


def ordered_cases(function: str) -> list[dict]:
    """All golden cases: those of the mutated loss first, then one of every file, then the rest."""
    cases = conformance.load_cases()
    seen, rank = set(), {}
    for case in cases:
        key = (str(case["loss_type"]), *sorted(case["params"]))
        rank[case["name"]] = 0 if function in conformance.loss_names(case) else 2 if key in seen else 1
        seen.add(key)
    return sorted(cases, key=lambda case: rank[case["name"]])


def caught_by(mutant: Mutant) -> str | None:
    """The name of the first test that fails on the mutant; None where it survives."""
    try:
        test_losses.losses, test_losses.loss_checks = load(mutant)
        for name, test in all_tests(mutant.function):
            if fails(test):
                return name
        return None
    except Exception as error:  # it cannot even be imported
        return f"import: {error}"
    finally:
        sys.modules["losses"] = test_losses.losses = losses
        sys.modules["parts.loss_checks"] = test_losses.loss_checks = loss_checks


def fails(test: Callable) -> bool:
    """Whether the test says so, or raises (pytest.raises without an error is no Exception)."""
    try:
        return bool(test())
    except KeyboardInterrupt:
        raise
    except BaseException:
        return True


def main(arguments: list[str]) -> int:
    wanted = [word for word in arguments if not word.startswith("-")]
    mutants = [m for m in find_mutants() if not wanted or m.function in wanted]
    if "--list" in arguments:
        print("\n".join(mutant.name for mutant in mutants))
        return 0
    survivors = 0
    for mutant in mutants:
        by = caught_by(mutant)
        reason = f"caught by {by}" if by else EQUIVALENT.get(mutant.name, "SURVIVES")
        survivors += reason == "SURVIVES"
        print(f"{mutant.name}   [{reason}]", flush=True)
    excused = sum(mutant.name in EQUIVALENT for mutant in mutants)
    print(f"{len(mutants)} mutants, {excused} of them equivalent; {survivors} survive")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
