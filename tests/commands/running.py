"""Running a command, and reading what it wrote."""

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import save_file
from typer.testing import CliRunner

from lip_jax.commands import app

TRAIN, HELD, TEST = slice(0, 1000), slice(1000, 1400), slice(1400, None)


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def run_json(*arguments):
    result = run(*arguments, "--json")
    return json.loads(result.stdout), result.stderr


def fails(command, *arguments):
    """The sentence on stderr of a command that cannot go on."""
    result = run(command, *arguments, code=2)
    assert result.stderr.startswith(f"lip-jax {command}: "), result.output
    assert result.stdout == ""
    assert "Traceback" not in result.output
    return result.stderr


def restored(path):
    """Every array of an orbax checkpoint by its path, as NumPy."""
    handler = ocp.PyTreeCheckpointHandler()
    args = ocp.checkpoint_utils.construct_restore_args(handler.metadata(path.absolute()).tree)
    args = jax.tree.map(lambda arg: ocp.RestoreArgs(restore_type=np.ndarray), args)
    tree = handler.restore(path.absolute(), args=ocp.args.PyTreeRestore(restore_args=args))
    return {jax.tree_util.keystr(path): value for path, value in jax.tree_util.tree_leaves_with_path(tree)}


def changed(before, after):
    """Names of the arrays that differ in any byte."""
    assert before.keys() == after.keys()
    assert all(np.asarray(before[name]).dtype == np.asarray(after[name]).dtype for name in before)
    return {
        name for name in before if np.asarray(before[name]).tobytes() != np.asarray(after[name]).tobytes()
    }


def head_of(path, module="['params']['Dense_1']"):
    arrays = restored(path)
    return arrays[module + "['kernel']"], arrays[module + "['bias']"]


def rows(path):
    with np.load(path) as held:
        return held["feats"], held["labels"]


def from_npz(path):
    with np.load(path) as held:
        return dict(held)


def as_npz(path, arrays):
    np.savez_compressed(path, **arrays)


def as_safetensors(path, arrays):
    save_file(
        {key: np.ascontiguousarray(part) for key, part in arrays.items()}, path, metadata={"by": "test"}
    )


def contents(path):
    """Every file below a path, and what is in it."""
    return {each: each.read_bytes() for each in path.rglob("*") if each.is_file()}
