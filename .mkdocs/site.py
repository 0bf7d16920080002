"""What the docs site takes from outside docs/: files of the repository, citations and links to the API.

Pages link to files of the repository as one who reads them there would, by relative paths, and cite by the
keys of docs/references.bib. Here both become links of the site, so that a wrong one fails a strict build.
"""

import ast
import posixpath
import re
from dataclasses import fields
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement

import griffe
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File
from pybtex.backends.html import Backend
from pybtex.database import parse_file
from pybtex.plugin import find_plugin

ROOT = Path(__file__).parent.parent
REFERENCES = parse_file(ROOT / "docs/references.bib")
SHOWN = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "benchmarks/results/*.md",
    "examples/*.py",
)
COPIED = ("LICENSE", "benchmarks/results/*.png")


def public_names(module: str = "lip_jax") -> list[str]:
    """`__all__` of a package of the library, read without importing it."""
    for node in ast.parse((ROOT / module.replace(".", "/") / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    raise ValueError(f"{module} has no __all__.")


def written_names() -> dict[str, str]:
    """How public names are written in pages, and the names they have in the reference.

    A chapter is written `lip_jax.rows`, as `rows` alone may be an argument; a name that only a chapter holds
    is written with the chapter before it.
    """
    chapters = {node.parent.name for node in (ROOT / "lip_jax").glob("*/__init__.py")} | {"noise", "plot"}
    top = public_names()
    names = {name: f"lip_jax.{name}" for name in top if name not in chapters}
    names |= {f"lip_jax.{name}": f"lip_jax.{name}" for name in [*top, "plot"]}
    for chapter in chapters & {*top, "plot"}:
        package = (ROOT / "lip_jax" / chapter).is_dir()
        for name in public_names(f"lip_jax.{chapter}") if package else public_functions(chapter):
            names |= {f"{before}{chapter}.{name}": f"lip_jax.{chapter}.{name}" for before in ("", "lip_jax.")}
    return names


def public_functions(module: str) -> list[str]:
    """The public functions of a module without `__all__`."""
    body = ast.parse((ROOT / f"lip_jax/{module}.py").read_text()).body
    functions = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    return [name for name in functions if not name.startswith("_")]


class _Citation(InlineProcessor):
    """`[key]` as a link to the bibliography."""

    def handleMatch(self, m, data):  # noqa: N802
        link = Element("autoref", identifier=m.group(1))
        link.text = m.group(0)
        return link, m.start(0), m.end(0)


class _Name(InlineProcessor):
    """A public name in code as a link to its reference."""

    def __init__(self, names, md):
        self.names = names
        either = "|".join(map(re.escape, names))
        super().__init__(rf"(?<![`\[])`({either})`(?![`\]])", md)

    def handleMatch(self, m, data):  # noqa: N802
        link = Element("autoref", identifier=self.names[m.group(1)], optional="")
        SubElement(link, "code").text = m.group(1)
        return link, m.start(0), m.end(0)


class _Links(Extension):
    def extendMarkdown(self, md):  # noqa: N802
        keys = "|".join(REFERENCES.entries)
        md.inlinePatterns.register(_Citation(rf"\[({keys})\](?![\[(])", md), "citation", 180)
        # Above code itself, at 190.
        md.inlinePatterns.register(_Name(written_names(), md), "public_name", 195)


@event_priority(100)
def on_config(config):
    """Docstrings and pages are read alike."""
    config.markdown_extensions.append(_Links())


def on_files(files, config):
    """Files of the repository take part under the paths they have there."""
    for pattern in SHOWN + COPIED:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            if path.suffix == ".py":
                text = f"# {name}\n\n````python\n{path.read_text()}````\n"
                files.append(File.generated(config, f"{name}.md", content=text))
            else:
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links to other files of the repository become links of the site."""
    here = page.file.src_uri
    in_repository = here if page.file.generated_by else f"docs/{here}"

    def relative(m: re.Match) -> str:
        path, mark, anchor = m.group(1).partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository), path))
        target = target.removeprefix("docs/")
        for name in (target, f"{target}.md"):
            if files.get_file_from_path(name):
                return f"]({posixpath.relpath(name, posixpath.dirname(here) or '.')}{mark}{anchor})"
        return m.group(0)

    markdown = re.sub(r"\]\((?![a-z]+:|[#/])([^)\s]+)\)", relative, markdown)
    if here == "bibliography.md":
        markdown += bibliography()
    if here == "index.md":
        example = re.search(r"```python\n.*?```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
        markdown = markdown.replace("{the first example of README.md}", example.group())
    # What is folded is Markdown too.
    return markdown.replace("<details>", '<details markdown="1">')


class Shapes(griffe.Extension):
    """The shapes of jaxtyping as the strings they are: `Float[Array, "k"]`, read by griffe as a name `k`."""

    def on_function(self, *, func, **_):  # noqa: D102
        quote_shapes([func.returns, *(parameter.annotation for parameter in func.parameters)])

    def on_attribute(self, *, attr, **_):  # noqa: D102
        quote_shapes([attr.annotation, attr.value])


def quote_shapes(expression) -> None:
    """Put the last argument of every jaxtyping type in quotes."""
    if isinstance(expression, list):
        for part in expression:
            quote_shapes(part)
    elif isinstance(expression, griffe.Expr):
        shaped = isinstance(expression, griffe.ExprSubscript)
        if shaped and expression.canonical_path.startswith("jaxtyping."):
            elements = expression.slice.elements
            elements[-1] = '"' + str(elements[-1]).strip("\"'") + '"'
        for field in fields(expression):
            quote_shapes(getattr(expression, field.name))


def bibliography() -> str:
    """A heading for each key, and the entry below it."""
    style = find_plugin("pybtex.style.formatting", "plain")()
    found = {
        entry.key: entry.text.render(Backend()) for entry in style.format_entries(REFERENCES.entries.values())
    }
    return "".join(f"\n## {key}\n\n{found[key]}\n" for key in sorted(found))
