"""Help, exit codes and completion."""

import pytest
from typer.testing import CliRunner

from lip_jax.commands import app
from tests.commands.running import run

COMMANDS = ("diagnose", "refine", "purify", "readout")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples_and_json(command):
    text = run(command, "--help").stdout
    assert "Examples:" in text
    assert f"lip-jax {command} " in text
    assert "--json" in text


def test_help_lists_exit_codes_and_commands():
    text = " ".join(run("--help").stdout.split())
    assert "2 arguments or files that cannot be used" in text
    assert all(command in text for command in (*COMMANDS, "demo", "--install-completion"))


def test_a_shell_completes_commands(monkeypatch):
    environment = {"_LIP_JAX_COMPLETE": "complete_bash", "COMP_WORDS": "lip-jax di", "COMP_CWORD": "1"}
    result = CliRunner().invoke(app, [], env=environment, prog_name="lip-jax")
    assert result.stdout.strip() == "diagnose"
