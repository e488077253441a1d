"""The mesh, the one table from logical to mesh axes, and the processes of one run."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from panda_jax.config import Compute, Config
from panda_jax.config import Mesh as MeshConfig
from panda_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")

# logical axis -> (mesh axes of a parameter, mesh axes of an activation). With zero: 1 parameters give up their fsdp
# axis and only the optimizer state keeps it.
LOGICAL_AXES: dict[str, tuple[str | None, str | tuple[str, ...] | None]] = {
    "batch": (None, ("data", "fsdp")),
    "sequence": (None, None),
    "embed": ("fsdp", None),
    "vocab": ("tensor", "tensor"),
    "heads": ("tensor", "tensor"),
    "kv_heads": ("tensor", "tensor"),
    "head_dim": (None, None),
    "mlp": ("tensor", "tensor"),
    "layers": (None, None),
}

BATCH_SPEC = PartitionSpec(("data", "fsdp"))


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Pin the layout of an activation whose dimensions have the given logical axes; no-op without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    spec = PartitionSpec(*(LOGICAL_AXES[axis][1] if axis else None for axis in axes))
    return jax.lax.with_sharding_constraint(x, spec)


def parameter_spec(axes: Sequence[str], shard_over_fsdp: bool) -> PartitionSpec:
    """Return the mesh axes of a parameter (or of optimizer state of its shape) with the given logical axes."""
    mesh_axes = (LOGICAL_AXES[axis][0] for axis in axes)
    return PartitionSpec(*(axis if axis != "fsdp" or shard_over_fsdp else None for axis in mesh_axes))


def check_divisible(shapes: Mapping[str, tuple[tuple[int, ...], PartitionSpec]], mesh: jax.sharding.Mesh) -> None:
    """Raise InputError for the first tensor with a dimension that its mesh axis does not divide."""
    for name, (shape, spec) in shapes.items():
        for size, axis in zip(shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise InputError(
                    f"mesh.{axis}: {mesh.shape[axis]} does not divide {name} of shape {shape} "
                    f"(dimension of {size}); choose a divisor of {size}"
                )


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
    """Return (data, fsdp, tensor) with the one -1 filled in; raise InputError unless they use every device."""
    sizes = [config.data, config.fsdp, config.tensor]
    found = f"mesh data {sizes[0]} x fsdp {sizes[1]} x tensor {sizes[2]}"
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise InputError(f"{found}: every size must be positive, at most one of data and fsdp may be -1")
    fixed = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes:
        if num_devices % fixed:
            raise InputError(f"{found}: {fixed} does not divide the {num_devices} devices; change one of them")
        sizes[sizes.index(-1)] = num_devices // fixed
    elif fixed != num_devices:
        raise InputError(f"{found} is {fixed} devices, but there are {num_devices}; set mesh.data=-1 to use them all")
    return sizes[0], sizes[1], sizes[2]


def num_devices_of(config: MeshConfig) -> int:
    """Return the number of devices that a fully written mesh describes; raise InputError where a size is -1."""
    if -1 in (config.data, config.fsdp):
        raise InputError("mesh: data and fsdp must be given (not -1) to know the number of devices; set mesh.data=N")
    return config.data * config.fsdp * config.tensor


def make_mesh(config: MeshConfig) -> jax.sharding.Mesh:
    """Return the mesh over every device of every process; raise InputError on the wrong platform or count."""
    try:
        devices = jax.devices()
    except RuntimeError as error:
        raise InputError(
            f"no usable devices: {str(error).splitlines()[0]}; check JAX_PLATFORMS and the driver"
        ) from error
    found = devices[0].platform
    if config.platform is not None and found != config.platform:
        raise InputError(
            f"mesh.platform: asked for {config.platform}, found {found}; install the extra for {config.platform} "
            f"or set mesh.platform={found}"
        )
    shape = mesh_shape(config, len(devices))
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def batch_split(config: Config, mesh: jax.sharding.Mesh) -> int:
    """Return the number of micro-batches that one global batch is cut into; raise InputError if it does not divide."""
    batch, shards = config.train.global_batch_size, mesh.shape["data"] * mesh.shape["fsdp"]
    micro = config.train.micro_batch_size
    if batch % shards:
        raise InputError(
            f"train.global_batch_size: {batch} rows cannot be spread over data {mesh.shape['data']} x fsdp "
            f"{mesh.shape['fsdp']} = {shards} devices; use a multiple of {shards}"
        )
    if micro is None:
        return 1
    if (batch // shards) % micro:
        raise InputError(
            f"train.micro_batch_size: {micro} does not divide the {batch // shards} rows of a device "
            f"(global_batch_size {batch} / {shards} devices); use a divisor of {batch // shards}"
        )
    return batch // shards // micro


def local_rows(mesh: jax.sharding.Mesh, global_batch_size: int) -> np.ndarray:
    """Return which rows of a global batch this process must read: sorted int64 [rows]."""
    sharding = NamedSharding(mesh, BATCH_SPEC)
    slices = sharding.addressable_devices_indices_map((global_batch_size,)).values()
    ranges = [np.arange(*index[0].indices(global_batch_size)) for index in slices if index is not None]
    return np.unique(np.concatenate(ranges)).astype(np.int64)


def to_global(batch: Mapping[str, np.ndarray], rows: np.ndarray, mesh: jax.sharding.Mesh, global_batch_size: int):
    """Turn this process's rows of a batch into global arrays [global_batch_size, T] spread over data and fsdp."""
    sharding = NamedSharding(mesh, BATCH_SPEC)

    def spread(local: np.ndarray) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            wanted = np.arange(*index[0].indices(global_batch_size))
            return local[np.searchsorted(rows, wanted)]

        return jax.make_array_from_callback((global_batch_size, *local.shape[1:]), sharding, shard)

    return {name: spread(local) for name, local in batch.items()}


def configure_jax(compute: Compute) -> None:
    """Make float32 mean float32 on every platform, and keep compiled programs across starts, small ones included."""
    # Where it is not asked for, GPUs and TPUs multiply float32 in a format of 10 or 7 bits.
    precision = "highest" if compute.dtype == "float32" else None
    jax.config.update("jax_default_matmul_precision", precision)
    if compute.compilation_cache_dir is not None:
        jax.config.update("jax_compilation_cache_dir", str(Path(compute.compilation_cache_dir).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


# ---- the processes of one run: how they find each other, and where they wait for each other -------------------------

RETRY_S = 0.1
# A process that fails alone takes the others down after this long; all leave together when a run ends well.
SHUTDOWN_TIMEOUT_S = 30


def start_processes(config: MeshConfig) -> None:
    """Join the other processes of the run, if there are any.

    torchrun's variables are mapped here, and ranks that do not appear within `init_timeout_s` are named by an
    InputError; SLURM, Open MPI, Kubernetes and TPU are recognised by JAX, which ends the process with words of its own.
    """
    environment = os.environ
    if int(environment.get("WORLD_SIZE", "1")) > 1:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "RANK") if name not in environment]
        if missing:
            raise InputError(
                f"WORLD_SIZE is {environment['WORLD_SIZE']} but {missing[0]} is not set; start with torchrun"
            )
        host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            port += 1  # torchrun itself listens on MASTER_PORT
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        # Processes of one machine share its GPUs, one each.
        shares = int(environment.get("LOCAL_WORLD_SIZE", "1")) > 1
        _call_the_roll(host, port, rank, world_size, config.init_timeout_s)
        jax.distributed.initialize(
            f"{host}:{port}",
            world_size,
            rank,
            local_device_ids=int(environment["LOCAL_RANK"]) if shares else None,
            initialization_timeout=config.init_timeout_s,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
        )
    elif _is_managed_by_cluster(environment):
        jax.distributed.initialize(
            initialization_timeout=config.init_timeout_s, shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S
        )


def _call_the_roll(host: str, port: int, rank: int, world_size: int, timeout_s: float) -> None:
    """Return once every rank is there; raise InputError that names those that are not.

    JAX's own time-out ends the process without a word about who is missing, so ranks first meet on the coordinator's
    port, which rank 0 gives back before JAX takes it.
    """
    deadline = time.monotonic() + timeout_s
    if rank != 0:
        try:
            with _connect(host, port, deadline) as connection:
                connection.settimeout(max(deadline - time.monotonic(), RETRY_S))
                connection.sendall(rank.to_bytes(4, "big"))
                if connection.recv(1) == b"+":
                    return
        except OSError:
            pass
        raise InputError(
            f"rank {rank}: rank 0 did not answer for all {world_size} ranks at {host}:{port} within "
            f"mesh.init_timeout_s {timeout_s} s; see what rank 0 says"
        )
    present: dict[int, socket.socket | None] = {0: None}
    try:
        with socket.create_server(("", port)) as server:
            while len(present) < world_size:
                server.settimeout(max(deadline - time.monotonic(), 1e-3))
                connection, _ = server.accept()
                connection.settimeout(max(deadline - time.monotonic(), 1e-3))
                present[int.from_bytes(connection.recv(4), "big")] = connection
        for connection in filter(None, present.values()):
            connection.sendall(b"+")
            connection.recv(1)  # the other side closes first, so that the port is free at once
            connection.close()
    except TimeoutError:
        missing = ", ".join(str(number) for number in range(world_size) if number not in present)
        raise InputError(
            f"rank 0: no word from rank {missing} of {world_size} at {host}:{port} within mesh.init_timeout_s "
            f"{timeout_s} s; start the missing ones, or raise it"
        ) from None
    except OSError as error:
        raise InputError(
            f"rank 0: cannot listen on port {port} ({error.strerror}); choose another MASTER_PORT"
        ) from None


def _connect(host: str, port: int, deadline: float) -> socket.socket:
    """Return a connection to rank 0, trying until it listens; raises OSError at the deadline."""
    while True:
        try:
            return socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), RETRY_S))
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(RETRY_S)


def _is_managed_by_cluster(environment: Mapping[str, str]) -> bool:
    """Tell whether a launcher that JAX recognises started more than one process."""
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        return True
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return True
    if "JOB_COMPLETION_INDEX" in environment and "KUBERNETES_SERVICE_HOST" in environment:
        return True
    if int(environment.get("MEGASCALE_NUM_SLICES", "1")) > 1:
        return True
    return any("," in environment.get(name, "") for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"))


class ProcessFailed(InputError):
    """Another process of the run could not do its part."""


def together(name: str, work: Callable[[], object]) -> None:
    """Do `work` in every process of the run and wait for all of them; `name` is used once in a run.

    What fails in one fails in each, so that none of them waits for something that will not come: its own error is
    raised where it happened, ProcessFailed with its text in the others.
    """
    failure: BaseException | None = None
    try:
        work()
    except BaseException as error:
        failure = error
    if jax.process_count() > 1:
        client = _coordinator()
        if failure is not None:
            client.key_value_set(f"panda_jax/{name}/{jax.process_index()}", f"{type(failure).__name__}: {failure}")
        client.wait_at_barrier(name, timeout_in_ms=24 * 3600 * 1000)
        failures = {int(key.rpartition("/")[2]): text for key, text in client.key_value_dir_get(f"panda_jax/{name}")}
        if failures and failure is None:
            rank = min(failures)
            raise ProcessFailed(f"rank {rank} failed, and with it the run: {failures[rank]}")
    if failure is not None:
        raise failure


def _coordinator() -> Any:
    """Return the client of JAX's coordination service, whose barriers do not occupy the devices."""
    from jax._src.distributed import global_state

    if global_state.client is None:
        raise InputError(
            f"{jax.process_count()} processes share the devices, but no launcher known to panda_jax started them; "
            f"start them with torchrun, SLURM, Open MPI or Kubernetes, or set TPU_WORKER_HOSTNAMES"
        )
    return global_state.client


def by_first(name: str, work: Callable[[], object]) -> None:
    """Do `work` in the first process while the others wait for it."""
    together(name, work if jax.process_index() == 0 else lambda: None)


def from_first(name: str, work: Callable[[], str]) -> str:
    """Return what `work` returns in the first process, in every process; what fails there fails in each."""
    found: list[str] = []
    by_first(name, lambda: found.append(work()))
    if jax.process_count() == 1:
        return found[0]
    client = _coordinator()
    if found:
        client.key_value_set(f"panda_jax/answer/{name}", found[0])
    return client.blocking_key_value_get(f"panda_jax/answer/{name}", 60_000)


def say(text: str) -> None:
    """Print a line, once in a run of several processes."""
    if jax.process_index() == 0:
        print(text, flush=True)


def first_decides(answer: bool) -> bool:
    """Return the first process's answer in every process: others may not see its disk."""
    if jax.process_count() == 1:
        return answer
    return bool(multihost_utils.broadcast_one_to_all(np.array(answer)))
