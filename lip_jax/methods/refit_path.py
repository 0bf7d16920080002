"""The path of refits: one head for each rank, from one solve.

Rank k keeps the first k singular values and takes the refitted ones beyond, so `Z(k) = Z(k+1) + (σ_k* − s_k)
(x·u_k − μ·u_k) v_kᵀ`: from the full rank down, a rank costs one pass over the logits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from lip_jax._results import ShortRepr
from lip_jax._types import Rank
from lip_jax.methods.protocol import Head, Settled
from lip_jax.numerics import linalg
from lip_jax.spectrum.split import leading


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class RefitPath(ShortRepr):
    """A head's components with the refitted value of each, which holds at every rank: ranks r, r − 1, …, 0.

    Attributes:
        came: The head as it came.
        u: Left singular vectors `(q, r)` of its kernel, or of the kernel less its mean over classes.
        s: Singular values before, `(r,)`.
        vt: Right singular vectors, transposed, `(r, l)`.
        sigma: Singular values after, in the order of `s`, `(r,)`.
        mean_u: The mean of `x·u_i`, `(r,)`; 0 where the bias is not refitted.
        scale: What targets were multiplied by, `α`; 0 where that is undefined.
        ignored: How many rows could not be used.
    """

    came: Head
    u: Float[jax.Array, "q r"]
    s: Float[jax.Array, "r"]
    vt: Float[jax.Array, "r l"]
    sigma: Float[jax.Array, "r"]
    mean_u: Float[jax.Array, "r"]
    scale: Float[jax.Array, ""]
    ignored: Int[jax.Array, ""]

    @property
    def strength(self) -> Float[jax.Array, "p"]:
        """The ranks. Of equals the highest comes first, nearest to the head as it came."""
        return jnp.arange(self.s.shape[0], -1, -1, dtype=jnp.float32)

    @property
    def available(self) -> Bool[jax.Array, ""]:
        """Whether the scale is defined."""
        return self.scale > 0

    def sigma_at(self, rank: Rank) -> Float[jax.Array, "r"]:
        """The singular values at one rank."""
        return jnp.where(leading(self.s.shape[0], rank), self.s, self.sigma)

    def head_at(self, rank: Rank) -> Head:
        """`W − U diag(s − σ) Vᵀ` and `b + V diag(s − σ) Uᵀμ`, in the dtypes they came in."""
        change = (self.s - self.sigma_at(rank))[None, :]
        kernel = _less(self.came.kernel, linalg.matmul(self.u * change, self.vt))
        if self.came.bias is None:
            return Head(kernel, None)
        bias_change = linalg.matmul(self.mean_u[None, :] * change, self.vt)[0]
        return Head(kernel, _less(self.came.bias, -bias_change))

    def head(self, index: jax.Array | int) -> Head:
        """The candidate at one place of the path."""
        return self.head_at(self.s.shape[0] - jnp.asarray(index, jnp.int32))

    def over_logits(
        self, feats: jax.Array, reduce: Callable[[jax.Array], jax.Array]
    ) -> Float[jax.Array, "p ..."]:
        """`reduce` of the logits at each rank, in memory for one rank."""
        dtype = self.s.dtype
        along = linalg.matmul(feats.astype(dtype), self.u) - self.mean_u[None, :]
        logits = linalg.logits_of(feats, self.came.kernel, self.came.bias).astype(dtype)

        def step(carry: tuple, component: tuple) -> tuple:
            logits, last = carry
            along_u, change, v = component
            logits = logits + along_u[:, None] * (change * v)[None, :]
            # Where a component keeps its value nothing changes.
            last = jax.lax.cond(change != 0, reduce, lambda _: last, logits)
            return (logits, last), last

        full = reduce(logits)
        components = (along.T, self.sigma - self.s, self.vt)
        _, below = jax.lax.scan(step, (logits, full), components, reverse=True)
        return jnp.concatenate([full[None], below[::-1]])

    def settled(self, rank: Rank) -> Settled:
        """The head at one rank."""
        return Settled(self.head_at(rank), rank, self.ignored, self.s, self.sigma_at(rank))


def _less(array: jax.Array, change: jax.Array) -> jax.Array:
    # Where nothing changes the entry stays bit for bit: −0 − (−0) would be +0.
    return jnp.where(change == 0, array, (array.astype(change.dtype) - change).astype(array.dtype))
