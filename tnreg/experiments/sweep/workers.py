"""Where the cells of a sweep are computed: in this process, on processes here, on a Dask cluster."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import importlib.util
import logging
import multiprocessing
import os
import pickle
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tnreg.errors import OptionError, TnregError
from tnreg.experiments.sweep.cell import Cell, Unfinished, Work, compute


class ClusterLost(TnregError):
    """The scheduler, or the way to it, is gone; cells that are done stay done."""


@dataclass(frozen=True)
class Done:
    """A cell with its results; ``computed`` is False if it was there meanwhile."""

    cell: Cell
    summary: dict[str, Any]
    computed: bool


@dataclass(frozen=True)
class Failed:
    """A cell that failed as often as it was tried, or whose time was over, with the last exception.

    ``traceback`` is its text where the exception itself has none.
    """

    cell: Cell
    exception: BaseException
    traceback: str = ""

    @property
    def error(self) -> str:
        """Kind of the exception and first line of its message."""
        said = str(self.exception).strip().splitlines()
        return f"{type(self.exception).__name__}: {said[0] if said else ''}".rstrip(": ")


def results(
    cells: list[Cell],
    work: Work,
    *,
    workers: int | None,
    threads: int | None,
    scheduler: str | None,
    retries: int,
    told: Callable[[int, str], None],
) -> Iterator[Done | Failed]:
    """Cells as they are done or have failed.

    Args:
        cells: What to compute.
        work: The function that does.
        workers: Processes here; 0 for this one.
        threads: Threads of torch in each.
        scheduler: Address, or scheduler file, of a cluster in place of processes here.
        retries: How often a cell is tried again; an ``OptionError`` comes again, so it is not.
        told: Is told how many cells are computed at once, and a line to show.

    Raises:
        ClusterLost: The scheduler ended meanwhile.
    """
    if not cells:
        return
    if workers == 0 and scheduler is None:
        told(1, "")
        yield from (_here(cell, work, threads, retries) for cell in cells)
        return
    most = min(workers or max(1, _processors() // (threads or 1)), len(cells))
    if scheduler is None and importlib.util.find_spec("distributed") is None:
        yield from _pool(cells, work, most, threads or 1, retries, told)
        return
    distributed = _distributed()
    if scheduler is None:
        connected = _local(distributed, most, threads or 1)
    else:
        connected = _remote(distributed, scheduler)
    with connected as client:
        yield from _on(client, distributed, cells, work, threads, retries, told)


def _here(cell: Cell, work: Work, threads: int | None, retries: int) -> Done | Failed:
    for attempt in range(retries + 1):
        try:
            return Done(cell, *compute(cell, work, threads))
        except Exception as error:
            if attempt == retries or isinstance(error, OptionError | Unfinished):
                return Failed(cell, error)
    raise AssertionError("not reached: there is at least one attempt")


def _pooled(cell: Cell, work: Work, threads: int, retries: int) -> Done | Failed:
    """One cell in a process of the pool; its error as something that reaches the other side."""
    outcome = _here(cell, work, threads, retries)
    if isinstance(outcome, Done):
        return outcome
    error, text = outcome.exception, "".join(traceback.format_exception(outcome.exception))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(outcome.error)
    return Failed(cell, error, text)


def _pool(
    cells: list[Cell],
    work: Work,
    workers: int,
    threads: int,
    retries: int,
    told: Callable[[int, str], None],
) -> Iterator[Done | Failed]:
    """Processes here without Dask: Python's own pool, which ends where one of them is killed."""
    told(workers, "")
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn")
    )
    with pool:
        jobs = {pool.submit(_pooled, cell, work, threads, retries): cell for cell in cells}
        try:
            for job in concurrent.futures.as_completed(jobs):
                error = job.exception()
                yield job.result() if error is None else Failed(jobs[job], error)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _on(
    client: Any,
    distributed: Any,
    cells: list[Cell],
    work: Work,
    threads: int | None,
    retries: int,
    told: Callable[[int, str], None],
) -> Iterator[Done | Failed]:
    import cloudpickle

    wide = {address: count for address, count in client.nthreads().items() if count > 1}
    if wide:
        warnings.warn(
            f"{len(wide)} of the workers have more than one thread, which wait for each other here; "
            "start them with dask worker --nthreads 1",
            stacklevel=2,
        )
    if not client.nthreads():
        told(0, "the cluster has no workers yet; start some with: dask worker ADDRESS --nthreads 1")
    dashboard = client.dashboard_link if _has_bokeh() else ""
    told(len(client.nthreads()), f"dashboard: {dashboard}" if dashboard else "")
    function = cloudpickle.dumps(work)  # functions of a script, too
    futures = {
        # pure=False: a key of its own for each, so that a cluster never takes an older result for it
        client.submit(_task, cell, function, threads, retries=retries, pure=False): cell
        for cell in cells
    }
    try:
        for future in distributed.as_completed(futures, loop=client.loop, raise_errors=False):
            cell = futures[future]
            error = future.exception()
            yield _outcome(cell, future.result()) if error is None else Failed(cell, error)
            future.release()
            told(len(client.nthreads()), "")
    except BaseException as error:
        if _is_lost(error, client):
            raise ClusterLost(
                "the Dask scheduler was lost before all cells were done; what is done is kept, and the "
                f"same call goes on.\n  {type(error).__name__}: {error}"
            ) from None
        with contextlib.suppress(Exception):
            client.cancel(list(futures), force=True)
        raise


@dataclass(frozen=True)
class _Refused:
    """An error that is not to be tried again, as a value: what Dask sees as an error it tries again."""

    error: OptionError | Unfinished
    traceback: str


def _task(
    cell: Cell, function: bytes, threads: int | None
) -> tuple[dict[str, Any], bool] | _Refused:
    """One cell on a worker."""
    import cloudpickle

    try:
        return compute(cell, cloudpickle.loads(function), threads)
    except (OptionError, Unfinished) as error:
        return _Refused(error, traceback.format_exc())


def _outcome(cell: Cell, value: tuple[dict[str, Any], bool] | _Refused) -> Done | Failed:
    if isinstance(value, _Refused):
        return Failed(cell, value.error, value.traceback)
    return Done(cell, *value)


def _is_lost(error: BaseException, client: Any) -> bool:
    cancelled = (asyncio.CancelledError, concurrent.futures.CancelledError)
    return isinstance(error, cancelled) or (
        isinstance(error, Exception) and client.status != "running"
    )


@contextlib.contextmanager
def _local(distributed: Any, workers: int, threads: int) -> Iterator[Any]:
    """A cluster of processes on this machine, each for one cell at a time."""
    import dask

    counts = {f"{name}_NUM_THREADS": threads for name in ("OMP", "MKL", "OPENBLAS")}
    environment = dict(os.environ)
    with dask.config.set({"distributed.nanny.pre-spawn-environ": counts}):
        cluster = distributed.LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=True, memory_limit=0,
            silence_logs=logging.CRITICAL,
            dashboard_address="127.0.0.1:0",  # a free port; 8787, if left out, may be another sweep's
        )  # fmt: skip
    try:
        _restore(environment)  # the nannies set it for this process as well
        with distributed.Client(cluster, set_as_default=False) as client:
            yield client
    finally:
        with contextlib.suppress(Exception):
            cluster.close()
        _restore(environment)


@contextlib.contextmanager
def _remote(distributed: Any, scheduler: str) -> Iterator[Any]:
    """A cluster that is there."""
    where = {"scheduler_file": scheduler} if Path(scheduler).is_file() else {"address": scheduler}
    try:
        client = distributed.Client(**where, set_as_default=False)
    except (OSError, ValueError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OptionError(
            f"no Dask scheduler at {scheduler!r}: {said}\n"
            "  write the address that dask scheduler printed, e.g. tcp://127.0.0.1:8786"
        ) from None
    with client:
        yield client


def _restore(environment: dict[str, str]) -> None:
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


def _distributed() -> Any:
    try:
        import distributed
    except ImportError:
        raise OptionError(
            "a sweep on several processes needs Dask: pip install 'tnreg[scale]'\n"
            "  or compute in this process, one cell after another: workers=0",
            argument="workers",
        ) from None
    return distributed


def _has_bokeh() -> bool:
    return importlib.util.find_spec("bokeh") is not None


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
