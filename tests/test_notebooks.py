"""The notebooks run from top to bottom on a small setting, each in a kernel of its own, and show pictures."""

import importlib.util
import os
import re
import tomllib
from pathlib import Path

import jupytext
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(path for path in (ROOT / "examples").glob("*.py") if "# %%" in path.read_text())
BY_NAME = {path.stem: path for path in NOTEBOOKS}


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """Where kernels keep what XLA compiles: the notebooks share their largest programs."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "programs"


@pytest.fixture
def executed(tmp_path, programs):
    """Run a notebook as a reader would, in an empty folder, and return its code cells."""

    def run(name, **variables):
        notebook = jupytext.read(BY_NAME[name])
        environment = {key: value for key, value in os.environ.items() if key != "LIP_JAX_DATA"}
        environment |= {
            "LIP_JAX_SMALL": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "JAX_COMPILATION_CACHE_DIR": str(programs),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        }
        client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
        client.execute(env=environment | variables)
        return [cell for cell in notebook.cells if cell.cell_type == "code"]

    return run


def check(cells):
    outputs = [output for cell in cells for output in cell.outputs]
    warned = [output.text for output in outputs if output.get("name") == "stderr"]
    assert not warned
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    shown = sum(cell.source.count("plt.show()") for cell in cells)
    assert pictures == shown


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_a_notebook_runs(executed, name):
    check(executed(name))


def test_the_figures_are_drawn_from_other_data_too(executed, clinc150):
    cells = executed("paper_figures", LIP_JAX_DATA=os.environ["LIP_JAX_DATA"])
    check(cells)
    assert "150 classes" in "".join(o.get("text", "") for cell in cells for o in cell.outputs)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_notebook_installs_the_package_only_where_it_is_missing(monkeypatch, name):
    notebook = jupytext.read(BY_NAME[name])
    assert notebook.metadata.kernelspec.name == "python3"
    install = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    lines = []

    class Shell:
        def run_line_magic(self, magic, line):
            lines.append((magic, line))

    exec(install, {"get_ipython": Shell})
    assert lines == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    exec(install, {"get_ipython": Shell})
    ((magic, line),) = lines
    assert magic == "pip"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert re.fullmatch(r"install --quiet 'lip_jax\[(\w+)\]'", line)[1] in extras


def test_notebooks_are_kept_as_scripts_and_listed():
    assert not list((ROOT / "examples").glob("*.ipynb"))
    listed = re.findall(r"\]\((\w+)\.py\)", (ROOT / "examples/README.md").read_text())
    assert {*BY_NAME} < {*listed}
    assert all((ROOT / f"examples/{name}.py").exists() for name in listed)
