"""What a command may replace, with `--force` and without, and that results are written whole."""

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import lip_jax
from lip_jax.commands.files import written_whole
from tests.commands.running import as_safetensors, contents, fails, head_of, rows, run


@pytest.mark.parametrize(
    ("command", "source", "name"),
    [
        ("refine", "state", "out"),
        ("readout", "head.npz", "out.npz"),
        ("purify", None, "p.csv"),
        ("diagnose", "state", "r.png"),
    ],
)
def test_nothing_is_overwritten_without_force(command, source, name, folder, tmp_path):
    out = tmp_path / name
    extra = ("--rank", 3) if command == "refine" else ()
    arguments = () if source is None else (folder / source,)
    options = (*arguments, "--feats", folder / "train.npz", *extra, "--out", out)
    run(command, *options)
    before = {path: path.stat().st_mtime_ns for path in (out, *out.rglob("*"))}
    assert f"--out {out} exists. Name another, or pass --force" in fails(command, *options)
    assert before == {path: path.stat().st_mtime_ns for path in (out, *out.rglob("*"))}
    run(command, *options, "--force")
    assert out.stat().st_mtime_ns > before[out]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_force_replaces_a_checkpoint_by_itself_repaired(folder, tmp_path):
    out = tmp_path / "out"
    for rank, force in ((8, ()), (3, ("--force",))):
        source = out if force else folder / "state"
        run("refine", source, "--feats", folder / "train.npz", "--rank", rank, "--out", out, *force)
    kernel, _ = head_of(folder / "state")
    twice = lip_jax.refine(
        lip_jax.refine(kernel, *rows(folder / "train.npz"), 8), *rows(folder / "train.npz"), 3
    )
    np.testing.assert_allclose(head_of(out)[0], twice, rtol=1e-5, atol=1e-6)


def thesis(place, folder):
    place.mkdir()
    (place / "chapter.tex").write_text("dear")


def checkpoint_in_a_folder_with_a_report(place, folder):
    shutil.copytree(folder / "clean", place / "repaired")
    (place / "report.html").write_text("long work")


def checkpoint_with_notes(place, folder):
    shutil.copytree(folder / "clean", place)
    (place / "notes.txt").write_text("which seed this was")


def checkpoint_with_another_inside(place, folder):
    shutil.copytree(folder / "clean", place)
    shutil.copytree(folder / "clean", place / "inner")


def one_numbered_folder(place, folder):
    shutil.copytree(folder / "clean", place / "run_1")


def empty(place, folder):
    place.mkdir()


@pytest.mark.parametrize(
    "make",
    [
        thesis,
        checkpoint_in_a_folder_with_a_report,
        checkpoint_with_notes,
        checkpoint_with_another_inside,
        one_numbered_folder,
        empty,
    ],
)
def test_force_spares_a_folder_that_is_not_one_whole_checkpoint(make, folder, tmp_path):
    make(tmp_path / "out", folder)
    before = contents(tmp_path)
    options = ("--feats", folder / "train.npz", "--force", "--out", tmp_path / "out")
    message = fails("readout", folder / "state", *options)
    assert "is no checkpoint of orbax, or holds other things too, so not even --force" in message
    assert contents(tmp_path) == before


@pytest.mark.parametrize("place", [".", "state/new"])
def test_force_writes_neither_around_nor_inside_the_checkpoint(place, folder):
    options = ("--feats", folder / "train.npz", "--force", "--out", folder / place)
    assert "not inside or around it" in fails("refine", folder / "state", *options)


@pytest.mark.parametrize("source", ["state", "steps", "itself"])
def test_force_spares_a_folder_of_several_steps(source, folder, tmp_path):
    shutil.copytree(folder / "steps", tmp_path / "run")
    before = contents(tmp_path)
    source = tmp_path / "run" if source == "itself" else folder / source
    options = ("--feats", folder / "train.npz", "--force", "--out", tmp_path / "run")
    message = fails("readout", source, *options)
    assert "holds 2 steps (3, 20) where the result is one, so not even --force" in message
    assert contents(tmp_path) == before


def test_force_replaces_one_named_step_and_spares_the_others(folder, tmp_path):
    steps = tmp_path / "run"
    shutil.copytree(folder / "steps", steps)
    before = contents(tmp_path)
    options = ("--feats", folder / "train.npz", "--force", "--out", steps / "20")
    run("readout", steps / "20", *options)
    after = contents(tmp_path)
    changed = {path.relative_to(steps).parts[0] for path in after if after[path] != before.get(path)}
    assert changed == {"20"}
    with ocp.CheckpointManager(steps) as manager:
        assert sorted(manager.all_steps()) == [3, 20]


def save_with_manager(path, tree):
    with ocp.CheckpointManager(path, metadata={"by": "test"}) as manager:
        about = ocp.args.JsonSave({"step": 7})
        manager.save(7, args=ocp.args.Composite(model=ocp.args.StandardSave(tree), about=about))


def save_items(path, tree):
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, ocp.args.Composite(model=ocp.args.StandardSave(tree)))


SAVED = {
    "tree": lambda path, tree: ocp.PyTreeCheckpointer().save(path, tree),
    "files": lambda path, tree: ocp.PyTreeCheckpointer(use_ocdbt=False).save(path, tree),
    "zarr3": lambda path, tree: ocp.PyTreeCheckpointer(use_zarr3=True).save(path, tree),
    "items": save_items,
    "manager": save_with_manager,
    "v1": lambda path, tree: ocp.v1.save_pytree(path, tree),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SAVED)
def test_force_replaces_whatever_orbax_saved_and_nothing_beside_it(kind, folder, tmp_path):
    kernel, bias = head_of(folder / "state")
    tree = {"head": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}, "steps": 3, "note": "text"}
    if kind in ("items", "manager", "v1"):
        tree.pop("note")
    SAVED[kind](tmp_path / "out", tree)
    options = ("--feats", folder / "train.npz", "--force", "--out", tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("dear")
    assert "not even --force" in fails("readout", folder / "clean", *options)
    (tmp_path / "out" / "notes.txt").unlink()
    for source in (tmp_path / "out", folder / "clean"):
        run("readout", source, *options)
    assert head_of(tmp_path / "out")[0].shape == (32, 10)


@pytest.fixture
def files(folder, tmp_path):
    """A folder with heads, rows and labels in files of their own."""
    for name in ("train.npz", "held.npz", "feats.npy", "head.npz"):
        shutil.copy(folder / name, tmp_path / name)
    as_safetensors(tmp_path / "head.safetensors", {"kernel": head_of(folder / "state")[0]})
    as_safetensors(tmp_path / "rows.safetensors", {"feats": np.load(folder / "feats.npy")})
    np.savetxt(tmp_path / "labels.csv", np.load(folder / "labels.npy"), fmt="%d")
    (tmp_path / "text.npz").write_text("no arrays")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("readout head.npz --feats train.npz --out held.npz", "held.npz holds feats, the inputs of a head"),
        ("readout head.npz --feats train.npz --out text.npz", "is no .npz file that can be read"),
        ("readout head.npz --feats train.npz --out train.npz", "train.npz, which this command reads"),
        ("readout head.safetensors --feats train.npz --out rows.safetensors", "holds feats"),
        ("purify --feats train.npz --out held.npz", "holds feats"),
        ("purify --feats feats.npy --labels labels.csv --out labels.csv", "labels.csv, which this command"),
        ("purify --feats train.npz --checkpoint head.npz --out head.npz", "head.npz, which this command"),
    ],
)
def test_force_spares_files_of_rows_and_files_that_are_read(line, words, files, monkeypatch):
    monkeypatch.chdir(files)
    before = contents(files)
    assert words in fails(*line.split(), "--force")
    assert contents(files) == before


def test_force_replaces_the_file_of_the_head_by_the_repaired_one(files):
    before = contents(files)
    run("readout", files / "head.npz", "--feats", files / "train.npz", "--force", "--out", files / "head.npz")
    after = contents(files)
    assert {path.name for path in after if after[path] != before[path]} == {"head.npz"}


def test_an_interruption_leaves_the_old_folder_where_it_was(tmp_path, monkeypatch):
    out, whole = tmp_path / "replaced", Path.rename
    out.mkdir()

    def interrupted(path, target):
        if target == out and path.name == "replaced":
            raise KeyboardInterrupt
        return whole(path, target)

    (out / "part").write_text("first")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt), written_whole(out, force=True) as fresh:
            fresh.mkdir()
    assert (out / "part").read_text() == "first"
    with written_whole(out, force=True) as fresh:
        fresh.mkdir()
        (fresh / "part").write_text("second")
    assert (out / "part").read_text() == "second"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_result_appears_whole_or_not_at_all(is_folder, tmp_path):
    out = tmp_path / "out"

    def write(path, text):
        if is_folder:
            path.mkdir()
            path = path / "part"
        path.write_text(text)

    def held():
        return (out / "part" if is_folder else out).read_text()

    def fail(force):
        with written_whole(out, force=force) as fresh:
            write(fresh, "half")
            assert not out.exists() or held() == "first"
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk"):
        fail(force=False)
    assert list(tmp_path.iterdir()) == []
    with written_whole(out, force=False) as fresh:
        write(fresh, "first")
    with pytest.raises(RuntimeError, match="disk"):
        fail(force=True)
    assert held() == "first"
    with written_whole(out, force=True) as fresh:
        write(fresh, "second")
    assert held() == "second"
    with pytest.raises(FileExistsError), written_whole(out, force=False) as fresh:
        write(fresh, "third")
    assert held() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_result_that_cannot_be_written_has_its_own_exit_code(folder, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copytree", full)
    options = ("--feats", folder / "train.npz", "--rank", 3, "--out", tmp_path / "out")
    result = run("refine", folder / "state", *options, code=3)
    assert "the result could not be written" in result.stderr
    assert "No space left" in result.stderr
    assert list(tmp_path.iterdir()) == []
