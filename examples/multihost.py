"""Refit a head on features spread over many files and many hosts: one pass, every host its own share.

Run it once on each of, say, four hosts, with the process id that is its own:

    python examples/multihost.py --coordinator host0:8476 --num-processes 4 --process-id 0 \
        --shards /data/features --head head.npz --rank 75 --out refined.npz --checkpoint /data/pass

`--shards` is a folder as `lip_jax.stream.shard_batches` reads it, and `head.npz` holds `kernel` and maybe
`bias`. On Cloud TPUs, and under Slurm or Open MPI, leave out the first three options: JAX finds them itself.
"""

import argparse
from pathlib import Path

import jax
import numpy as np

import lip_jax


def main() -> None:
    """Pass this process's shards, merge with the others, and let the first write the head."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--head", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--batch-rows", type=int, default=65_536)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--every", type=int, default=100, help="batches between checkpoints")
    parser.add_argument("--coordinator")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    args = parser.parse_args()

    # A process that is gone is noticed by the others within this time, and ends them.
    jax.distributed.initialize(
        args.coordinator, args.num_processes, args.process_id, heartbeat_timeout_seconds=20
    )
    with np.load(args.head) as held:
        head = dict(held)
    q, l = head["kernel"].shape
    moments = lip_jax.accumulate(
        lip_jax.moment_accumulator(q, l),
        lambda done: lip_jax.stream.shard_batches(args.shards, args.batch_rows, start=done),
        batch_rows=args.batch_rows,
        checkpoint=args.checkpoint,
        every=args.every,
    )
    if jax.process_index() == 0:
        head["kernel"] = lip_jax.refine_from(head["kernel"], moments, args.rank)
        np.savez(args.out, **head)
    print(f"process {jax.process_index()}: {float(moments.rows):,.0f} rows in all", flush=True)


if __name__ == "__main__":
    main()
