"""The house: lower chapters never import higher ones, and what is public stays small enough to learn."""

import ast
import inspect
from pathlib import Path

import lip_jax

PACKAGE = Path(lip_jax.__file__).parent
# From the ground up. Chapters of one floor may not import each other either.
FLOORS = (
    ("_types", "_checks"),
    ("_results",),
    ("numerics",),
    ("rows",),
    ("noise", "spectrum"),
    ("sums",),
    ("bounds",),
    ("quality",),
    ("methods",),
    ("choice",),
    ("models",),
    ("stream",),
    ("networks",),
    ("plot",),
    ("demo",),
    ("commands",),
    ("cli",),
)
FLOOR = {chapter: height for height, floor in enumerate(FLOORS) for chapter in floor}
MOST_NAMES, MOST_PARAMETERS = 40, 12
NAMESPACES = {name for name in lip_jax.__all__ if inspect.ismodule(getattr(lip_jax, name))}


def chapter_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_chapters(path):
    """Chapters that a module imports anywhere, within functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "lip_jax" and len(parts) > 1:
                yield parts[1], node.lineno


def test_every_module_belongs_to_a_chapter():
    chapters = {chapter_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert chapters == set(FLOOR)


def test_lower_chapters_never_import_higher_ones():
    upwards = []
    for path in PACKAGE.rglob("*.py"):
        own = chapter_of(path)
        if own == "__init__":
            continue
        for chapter, line in imported_chapters(path):
            # What is not a chapter is a name of the top level, which imports all of the library.
            floor = FLOOR.get(chapter, FLOOR["networks"])
            if chapter != own and floor >= FLOOR[own]:
                upwards.append(f"{path.relative_to(PACKAGE)}:{line} imports {chapter}")
    assert not upwards, "\n".join(upwards)


def test_the_top_level_holds_at_most_40_names_beside_the_namespaces():
    assert len(set(lip_jax.__all__) - NAMESPACES) <= MOST_NAMES


def public_functions():
    for name in ("", *sorted(NAMESPACES)):
        space = getattr(lip_jax, name) if name else lip_jax
        for function in vars(space).values():
            own = inspect.isfunction(function) and function.__module__.startswith("lip_jax")
            if own and function.__name__ in getattr(space, "__all__", [function.__name__]):
                yield function


def test_no_public_function_has_more_than_12_parameters():
    many = {
        function.__name__: len(inspect.signature(function).parameters)
        for function in public_functions()
        if len(inspect.signature(function).parameters) > MOST_PARAMETERS
    }
    assert not many
