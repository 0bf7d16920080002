"""The site holds every public name, each with an example that runs; what is said of versions is true."""

import doctest
import inspect
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import lip_jax
from lip_jax import plot

ROOT = Path(__file__).parent.parent
CHAPTERS = {
    name: value
    for name, value in vars(lip_jax).items()
    if name in lip_jax.__all__ and inspect.ismodule(value)
}


def names_of(module):
    if hasattr(module, "__all__"):
        return module.__all__
    return [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]


TOP = {f"lip_jax.{name}": getattr(lip_jax, name) for name in lip_jax.__all__ if name not in CHAPTERS}
# What the top level holds stands in the reference under that name, and once.
PUBLIC = TOP | {
    f"{chapter.__name__}.{name}": getattr(chapter, name)
    for chapter in (*CHAPTERS.values(), plot)
    for name in names_of(chapter)
    if not any(getattr(chapter, name) is value for value in TOP.values())
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_public_name_is_in_the_reference_once():
    pages = {path.stem: path.read_text() for path in (ROOT / "docs/api").glob("*.md")}
    # A module gives the words above its names, and is shown without members.
    directive = r"^::: (\S+)\n(?!    options:\n      members: false)"
    shown = [name for text in pages.values() for name in re.findall(directive, text, flags=re.MULTILINE)]
    assert len(set(shown)) == len(shown)
    assert set(PUBLIC) <= set(shown)


def test_every_chapter_has_a_page_of_its_name():
    for chapter in (*CHAPTERS, "plot"):
        page = (ROOT / f"docs/api/{chapter}.md").read_text()
        assert f"::: lip_jax.{chapter}\n" in page


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if inspect.isfunction(value)])
def test_every_public_function_has_an_example_that_calls_it(name):
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(PUBLIC[name]))
    called = rf"\b{name.rpartition('.')[2]}\("
    assert any(re.search(called, example.source) for example in examples)


def test_every_page_is_named_in_the_navigation():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def targets(entry):
        if isinstance(entry, str):
            return {entry}
        parts = entry.values() if isinstance(entry, dict) else entry
        return set().union(*map(targets, parts))

    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= targets(config["nav"])


def test_what_pages_load_is_bundled():
    loaded = [path for path in (ROOT / "docs/assets").rglob("*") if path.suffix in (".js", ".css")]
    addresses = {found for path in loaded for found in re.findall(r"https?://([\w.]+)", path.read_text())}
    # Names of XML namespaces, and MathJax's own page.
    assert addresses <= {"www.w3.org", "www.mathjax.org"}


def requirements():
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"]]
    for extra in ("flax", "cli", "demo", "notebooks", "test"):
        lines += extras[extra]
    found = [Requirement(line) for line in lines]
    return [requirement for requirement in found if requirement.name != PROJECT["name"]]


def oldest(python):
    lines = (ROOT / ".ci/oldest.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {
        canonicalize_name(requirement.name): Version(str(requirement.specifier).removeprefix("=="))
        for requirement in found
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python})
    }


def test_the_oldest_versions_are_the_lower_bounds():
    bounds = {
        canonicalize_name(requirement.name): Version(str(requirement.specifier).removeprefix(">="))
        for requirement in requirements()
    }
    first, last = oldest("3.11"), oldest("3.13")
    assert first == bounds | {"jaxlib": bounds["jax"]}
    assert last.keys() == first.keys()
    assert all(last[name] >= first[name] for name in first)


def test_supported_pythons_are_those_of_the_workflow():
    stated = {line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "Python :: 3." in line}
    workflow = yaml.safe_load((ROOT / ".github/workflows/versions.yml").read_text())
    assert set(workflow["jobs"]["test"]["strategy"]["matrix"]["python"]) == stated
    assert PROJECT["requires-python"] == f">={min(stated, key=Version)}"


def test_citation_names_the_version_and_the_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == lip_jax.__version__
    assert citation["license"] == PROJECT["license"]
    titles = re.findall(r"^  title\s*= \{(.*)\},$", (ROOT / "docs/references.bib").read_text(), re.MULTILINE)
    assert {paper["title"] for paper in citation["references"]} <= set(titles)
