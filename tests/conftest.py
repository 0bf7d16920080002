"""The regime every test runs in: strict promotion, and shapes checked at run time against the annotations."""

import dataclasses
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import jaxtyping

# Before SciPy is first loaded: beside XLA's threads and another worker's, LAPACK's starve (see benchmarks).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Most of the suite is compilation: LLVM works quickly rather than well, and kernels do not pass through MLIR.
# `XLA_FLAGS=` runs what users run.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")

# Commands keep programs between processes: those of a test are its own.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

# Before lip_jax is first imported, as only modules imported later are instrumented.
jaxtyping.install_import_hook("lip_jax", "beartype.beartype")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

import lip_jax  # noqa: E402

settings.register_profile("reproducible", deadline=None, derandomize=True, max_examples=25, database=None)
settings.load_profile("reproducible")


def _build_unchecked(cls: type) -> None:
    # JAX rebuilds pytree nodes with leading axes under vmap, and with placeholders for leaves.
    cls.__init__ = getattr(cls.__init__, "__wrapped__", cls.__init__)


# Leaves, which need what the library itself does not.
LEAVES = ("cli", "commands", "demo", "plot")


def _modules() -> Iterator[ModuleType]:
    """All modules of the package but the leaves."""
    root = Path(lip_jax.__path__[0])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] not in LEAVES and parts[-1] not in ("__init__", "__main__"):
            yield importlib.import_module(".".join(("lip_jax", *parts)))


for _module in _modules():
    for _held in vars(_module).values():
        if isinstance(_held, type) and dataclasses.is_dataclass(_held):
            _build_unchecked(_held)


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="module", autouse=True)
def no_more_programs_than_memory_maps():
    """Programs take memory maps, and a process that has 65,530 of them is killed by Linux."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def unchecked():
    """Switch off run-time type checks, which would speak before the package's own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def compilations():
    """How many programs XLA has compiled since the test began, eager operations included."""
    events = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: len(events)
    # jax 0.8.0 lacks it; a listener that stays on listens to no one's list.
    getattr(jax.monitoring, "unregister_event_duration_listener", lambda _: None)(listen)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def clinc150():
    if not os.environ.get("LIP_JAX_DATA"):
        pytest.skip("LIP_JAX_DATA does not name the folder of real data")
    from benchmarks import data

    return data.load_clinc150()


@pytest.fixture(scope="session")
def cnn():
    """A trained CNN: model, state, variables, images, noisy labels and the features of its head."""
    from tests import zoo

    x, labels = zoo.digits()
    noisy = lip_jax.noise.symmetric(jax.random.key(5), labels, 0.3, num_classes=zoo.NUM_CLASSES)
    model = zoo.BatchNormCNN()
    state, stats = zoo.train_linen(model, x[:600], noisy[:600])
    variables = {"params": state.params, "batch_stats": stats}
    feats = lip_jax.capture_features(model, variables, x, head="Dense_1")
    return model, state, variables, x, noisy, feats


@pytest.fixture(scope="session")
def nnx_model():
    """A trained nnx module, images, noisy labels and the features of its head."""
    from flax import nnx

    from tests import zoo

    x, labels = zoo.digits()
    noisy = lip_jax.noise.symmetric(jax.random.key(5), labels, 0.3, num_classes=zoo.NUM_CLASSES)
    model = zoo.train_nnx(zoo.NnxClassifier(nnx.Rngs(0)), x[:600], noisy[:600])
    feats = lip_jax.capture_features(model, None, x, head="head")
    return model, x, noisy, feats
