"""The project's promises about itself: its README runs, its references exist, its names are exported."""

import inspect
import re
from pathlib import Path

import jax
import pytest

import lip_jax

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.slow
def test_readme_examples_run_one_after_the_other(unchecked):
    assert EXAMPLES
    names = {"__name__": "readme"}
    # As JAX comes: optimisers do not hold to the strict regime of the tests.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for example in EXAMPLES:
            exec(compile(example, "README.md", "exec"), names)


def blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize(
    "path",
    [path for path in sorted((ROOT / "docs").rglob("*.md")) if blocks(path)],
    ids=lambda path: path.stem,
)
def test_examples_of_a_guide_run_one_after_the_other(path, unchecked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "guide"}
    # As JAX comes: optimisers do not hold to the strict regime of the tests.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for example in blocks(path):
            exec(compile(example, path.name, "exec"), names)


def test_readme_gives_two_setup_commands():
    commands = re.findall(r"^python3 -m venv .*$", README, flags=re.MULTILINE)
    assert len(commands) == 2
    assert commands[0].endswith("lip-jax demo")
    assert "pytest" in commands[1]


def test_every_cited_reference_is_in_the_bibliography():
    entries = set(
        re.findall(r"^@\w+\{(\w+),", (ROOT / "docs/references.bib").read_text(), flags=re.MULTILINE)
    )
    sources = [*(ROOT / "lip_jax").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    cited = {key for path in sources for key in re.findall(r"\[([a-z]+\d{4})\]", path.read_text())}
    assert cited
    assert cited <= entries


def test_all_lists_exactly_the_public_names_in_order():
    chapters = {name for name in lip_jax.__all__ if inspect.ismodule(getattr(lip_jax, name))}
    public = {
        name
        for name, value in vars(lip_jax).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert set(lip_jax.__all__) == public | chapters
    assert sorted(lip_jax.__all__) == lip_jax.__all__


@pytest.mark.parametrize("name", [n for n in lip_jax.__all__ if inspect.isfunction(getattr(lip_jax, n))])
def test_public_docstring_is_complete(name):
    docstring = inspect.getdoc(getattr(lip_jax, name))
    for section in ("Args:", "Returns:", "Example:", "Reference:"):
        assert section in docstring, section


def test_version_is_in_the_changelog():
    assert f"## {lip_jax.__version__}" in (ROOT / "CHANGELOG.md").read_text()
