"""Random graphs labelled by their maximum degree, and Flax networks that suit this task or do not [li2020].

A graph is one matrix `(N, N)`: off the diagonal its edges, on it the features of its nodes in (0, 1], and 0
where there is no node. The largest degree is the maximum over nodes of a sum over neighbours, so a network
with this sum and this maximum has only simple functions left to learn.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

Pooling = Literal["sum", "max"]

NODES = 16
DEGREES = 12


class Graphs(NamedTuple):
    """Graphs `(n, N, N)` in float32 and class ids `(n,)`, the maximum degree less one."""

    x: np.ndarray
    y: np.ndarray


def random_graphs(rng: np.random.Generator, count: int, nodes: int = NODES) -> np.ndarray:
    """Erdős-Rényi graphs of 4 to `nodes` nodes and edge probabilities of .02 to .9, features uniform."""
    exists = np.arange(nodes)[None, :] < rng.integers(4, nodes + 1, count)[:, None]
    density = rng.uniform(0.02, 0.9, count)
    edges = np.triu(rng.random((count, nodes, nodes)) < density[:, None, None], 1)
    edges = (edges | edges.transpose(0, 2, 1)) & exists[:, :, None] & exists[:, None, :]
    graphs = edges.astype(np.float32)
    diagonal = np.arange(nodes)
    graphs[:, diagonal, diagonal] = exists * (1 - rng.random((count, nodes), np.float32))
    return graphs


def max_degree(graphs: np.ndarray) -> np.ndarray:
    """The largest number of neighbours of a node."""
    edges = graphs * (1 - np.eye(graphs.shape[-1], dtype=graphs.dtype))
    return edges.sum(axis=-1).max(axis=-1).astype(np.int32)


def load_graphs(seed: int, sizes: Sequence[int], degrees: int = DEGREES) -> list[Graphs]:
    """Parts of these sizes with as many graphs of each maximum degree, 1 to `degrees`, in random order."""
    rng = np.random.default_rng(seed)
    each = [-(-size // degrees) for size in sizes]
    found: list[list[np.ndarray]] = [[] for _ in range(degrees)]
    while min(map(len, found)) < sum(each):
        drawn = random_graphs(rng, 4096)
        degree = max_degree(drawn)
        for y, graphs in enumerate(found):
            graphs.extend(drawn[degree == y + 1])
    parts, start = [], 0
    for size, count in zip(sizes, each, strict=True):
        x = np.concatenate([graphs[start : start + count] for graphs in found])
        order = rng.permutation(len(x))[:size]
        parts.append(Graphs(x[order], np.repeat(np.arange(degrees, dtype=np.int32), count)[order]))
        start += count
    return parts


class GraphNet(nn.Module):
    """One round of messages and a readout over the nodes, then two dense layers.

    `dense(readout_u update(x_u, aggregate_{v ∈ N(u)} message(x_v)))`. All features are at least 0, so that 0
    is neutral for sum and maximum alike.
    """

    num_classes: int
    aggregate: Pooling
    readout: Pooling
    width: int = 32

    @nn.compact
    def __call__(self, graphs):  # noqa: D102
        feature = jnp.diagonal(graphs, axis1=1, axis2=2)[:, :, None]
        edges = graphs * (1 - jnp.eye(graphs.shape[1], dtype=graphs.dtype)[None, :, :])
        messages = nn.relu(nn.Dense(self.width, name="message")(feature))
        if self.aggregate == "sum":
            received = edges @ messages
        else:
            received = (edges[:, :, :, None] * messages[:, None, :, :]).max(axis=2)
        states = jnp.concatenate([feature, received], axis=2)
        for i in range(2):
            states = nn.relu(nn.Dense(self.width, name=f"update_{i}")(states))
        states = jnp.where(feature > 0, states, 0)
        whole = states.sum(axis=1) if self.readout == "sum" else states.max(axis=1)
        hidden = nn.relu(nn.Dense(64, name="dense")(whole))
        return nn.Dense(self.num_classes, name="head")(hidden)
