"""Where the cells of a sweep are computed: in this process, in processes here, on a Dask cluster."""

from __future__ import annotations

import contextlib
import importlib
import logging
import multiprocessing
import os
import pickle
import warnings
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

from tnreg.errors import OptionError, TnregError
from tnreg.experiments.sweep.cell import Cell, Unfinished, Work, compute

Outcome = tuple[dict[str, Any], bool] | BaseException
"""What ``compute`` returned, or the last error."""


def results(
    cells: list[Cell],
    work: Work,
    workers: int | None,
    threads: int | None,
    scheduler: str | None,
    retries: int,
) -> Iterator[tuple[Cell, Outcome]]:
    """Yield every cell as soon as it is done or has failed; the arguments are those of ``run``.

    Raises:
        TnregError: The scheduler ended meanwhile.
    """
    if not cells or (workers == 0 and scheduler is None):
        yield from ((cell, _attempt(cell, work, threads, retries)) for cell in cells)
        return
    affinity = hasattr(os, "sched_getaffinity")
    processors = len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1
    most = min(workers or max(1, processors // (threads or 1)), len(cells))
    with _executor(most, scheduler) as executor:
        jobs = {executor.submit(_attempt, cell, work, threads, retries): cell for cell in cells}
        try:
            for job in futures.as_completed(jobs):
                yield jobs[job], job.exception() or job.result()
        except futures.CancelledError:
            raise TnregError(
                "the Dask scheduler was lost before all cells were done; what is done is kept, "
                "and the same call goes on."
            ) from None
        finally:
            for job in jobs:
                job.cancel()


def _attempt(cell: Cell, work: Work, threads: int | None, retries: int) -> Outcome:
    """Compute one cell, again after an error that another attempt may not have."""
    try:
        return compute(cell, work, threads)
    except Exception as error:
        if retries and not isinstance(error, OptionError | Unfinished):
            return _attempt(cell, work, threads, retries - 1)
        try:
            pickle.loads(pickle.dumps(error))  # a worker sends it
        except Exception:
            return RuntimeError(f"{type(error).__name__}: {error}")
        return error


@contextlib.contextmanager
def _executor(workers: int, scheduler: str | None) -> Iterator[futures.Executor]:
    """Yield Dask's executor on a cluster or on processes here, or Python's where Dask is missing."""
    try:
        distributed: Any = importlib.import_module("distributed")
    except ImportError:
        if scheduler is not None:
            message = "a sweep on a cluster needs Dask: pip install 'tnreg[scale]'"
            raise OptionError(message, argument="scheduler") from None
        with futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            yield pool
        return
    with contextlib.ExitStack() as stack:
        if scheduler is not None:
            client = _connect(distributed, scheduler)
        else:
            cluster = distributed.LocalCluster(
                n_workers=workers, threads_per_worker=1, memory_limit=0,
                silence_logs=logging.CRITICAL, dashboard_address=None,
                scheduler_kwargs={"dashboard_address": ":0"},  # none is shown, but its port is taken
            )  # fmt: skip
            client = distributed.Client(stack.enter_context(cluster), set_as_default=False)
        yield stack.enter_context(client).get_executor(pure=False)  # never an older result


def _connect(distributed: Any, scheduler: str) -> Any:
    """Return a client of a cluster; warn where its workers would wait."""
    where = {"scheduler_file": scheduler} if Path(scheduler).is_file() else {"address": scheduler}
    try:
        client = distributed.Client(**where, set_as_default=False)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OptionError(
            f"no Dask scheduler at {scheduler!r}: {reason}\n"
            "  write the address that dask scheduler printed, e.g. tcp://127.0.0.1:8786",
            argument="scheduler",
        ) from None
    threads = client.nthreads().values()
    if not threads or max(threads) > 1:
        message = "have more than one thread" if threads else "are not there yet"
        warnings.warn(f"workers {message}; start: dask worker ADDRESS --nthreads 1", stacklevel=2)
    return client
