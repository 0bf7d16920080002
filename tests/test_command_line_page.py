"""The session in docs/command_line.md, run as it stands there: what it prints is what the page shows."""

import re
import shlex
from pathlib import Path

import jax
import pytest
from typer.testing import CliRunner

from lip_jax.commands import app

PAGE = (Path(__file__).parent.parent / "docs" / "command_line.md").read_text()
PROGRAM = re.search(r"```python title=\"train.py\"\n(.*?)```", PAGE, re.DOTALL)[1]
COMMANDS = re.findall(r"^```console\n\$ lip-jax (.*?)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def without_numbers(text):
    """Words and signs alone: numbers differ between machines, and with them columns and line breaks."""
    # Nor is it said which of two readouts is taken that are almost as good.
    text = re.sub(
        r"^[^:\n]+: better than", "it is better than", text.replace("\n* ", "\n  "), flags=re.MULTILINE
    )
    numbers = re.sub(r"[+-]?\b(?:\d[\d.]*(?:e[+-]?\d+)?|inf)\b%?", "#", text)
    return " ".join(re.sub("─+", "─", numbers).split())


@pytest.mark.slow
def test_the_session_prints_what_the_page_shows(tmp_path, monkeypatch, unchecked):
    assert len(COMMANDS) == 6
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"):
        exec(compile(PROGRAM, "train.py", "exec"), {"__name__": "__main__"})
    shown, printed = [], []
    for command, output in COMMANDS:
        result = CliRunner().invoke(app, shlex.split(command))
        assert "Traceback" not in result.output, result.output
        shown.append(f"{command} {without_numbers(output)}")
        printed.append(f"{command} {without_numbers(result.output)}")
    assert printed == shown
    written = {"digits", "clean", "report.html", "repaired", "purified.csv", "readout", "refined"}
    assert written <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(("number", "same"), [("1 of 2", True), ("3.5e-1 of inf", True), ("1 for 2", False)])
def test_numbers_are_left_out_of_the_comparison_and_words_are_not(number, same):
    assert (without_numbers(number) == without_numbers("12 of 7")) is same
