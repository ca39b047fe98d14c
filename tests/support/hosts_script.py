"""Run by test_devices.py once for each host: JAX over two processes, each with half of the pairs."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import jax
import jax_problem
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def main(rank: str, address: str, output: str) -> None:
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=int(rank))
    params, batch = jax_problem.problem("float64")
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    mine = np.split(np.arange(8), 2)[int(rank)]
    placed = {
        name: jax.make_array_from_process_local_data(rows, np.asarray(x)[mine], x.shape) for name, x in batch.items()
    }
    shared = {name: jax.make_array_from_process_local_data(everywhere, np.asarray(x)) for name, x in params.items()}
    step = jax.jit(jax_problem.step(), out_shardings=(None, everywhere))
    result, grads = step(shared, placed)
    gaps = multihost_utils.process_allgather(result.anchor_gaps, tiled=True)
    found = {name: np.asarray(x.addressable_data(0)) for name, x in grads.items()}
    np.savez(output, gaps=gaps, processes=jax.process_count(), **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
