"""Compiled programs kept between commands: where the environment says, and nowhere if it says so."""

import os
import subprocess
import sys

import numpy as np
import pytest

# Only the command itself keeps programs, not `lip_jax.commands` within another program.
PROGRAM = [sys.executable, "-m", "lip_jax.cli", "purify", "--feats", "rows.npz", "--out"]


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, False])
def test_programs_are_kept_for_the_next_command(tmp_path, kept):
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    np.savez(tmp_path / "rows.npz", feats=rng.normal(size=(60, 4)) + np.eye(3, 4)[labels], labels=labels)
    users = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    users |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "MPLCONFIGDIR": str(tmp_path)}
    if not kept:
        users["JAX_ENABLE_COMPILATION_CACHE"] = "false"

    def held():
        return {path.name for path in (tmp_path / "cache" / "lip-jax").glob("*-cache")}

    found = []
    for out in ("first.csv", "second.csv"):
        done = subprocess.run(
            [*PROGRAM, out], cwd=tmp_path, env=users, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found.append(held())
    assert bool(found[0]) is kept
    assert found[1] == found[0]
    assert (tmp_path / "first.csv").read_text() == (tmp_path / "second.csv").read_text()
