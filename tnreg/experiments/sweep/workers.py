"""Where the cells of a sweep are computed: in this process, in processes here, on a Dask cluster."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import pickle
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from concurrent.futures.thread import BrokenThreadPool
from functools import partial
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
        TnregError: The scheduler ended meanwhile, or processes here cannot begin.
    """
    attempt = partial(_attempt, work=work, threads=threads)
    if workers == 0 or not cells:
        yield from ((cell, attempt(cell, retries)) for cell in cells)
        return
    affinity = hasattr(os, "sched_getaffinity")
    processors = len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1
    most = min(workers or max(1, processors // (threads or 1)), len(cells))
    with _processes(most) if scheduler is None else _cluster(scheduler) as submit:
        jobs = dict[Any, Cell]()
        try:
            for cell in cells:
                jobs[submit(attempt, cell, retries)] = cell
            for job in futures.as_completed(jobs):
                error = job.exception()
                if isinstance(error, BrokenThreadPool):
                    raise error
                yield jobs[job], error or job.result()
        except BrokenThreadPool:
            raise TnregError(
                "the processes of the sweep cannot begin, for the reason above.\n"
                '  a script of your own needs `if __name__ == "__main__":`; or take workers=0',
                argument="workers",
            ) from None
        except futures.CancelledError:
            raise TnregError(
                "the Dask scheduler was lost before all cells were done; what is done is kept, "
                "and the same call goes on."
            ) from None
        finally:
            for job in jobs:
                job.cancel()


def _attempt(cell: Cell, retries: int, work: Work, threads: int | None) -> Outcome:
    """Compute one cell, again after an error that another attempt may not have."""
    try:
        return compute(cell, work, threads)
    except Exception as error:
        if retries and not isinstance(error, OptionError | Unfinished):
            return _attempt(cell, retries - 1, work, threads)
        try:
            pickle.loads(pickle.dumps(error))  # a worker sends it
        except Exception:
            return RuntimeError(f"{type(error).__name__}: {error}")
        return error


@contextlib.contextmanager
def _processes(count: int) -> Iterator[Any]:
    """Yield ``submit`` of as many threads, each with a process of its own; one that dies is replaced."""
    try:
        from cloudpickle import dumps  # it comes with Dask, and takes functions of notebooks as well
    except ImportError:
        from pickle import dumps
    own, spawn = threading.local(), multiprocessing.get_context("spawn")
    theirs, alive = spawn.Pipe(duplex=False)  # nothing is sent; they end when it is closed

    def begin() -> None:
        own.process = futures.ProcessPoolExecutor(1, spawn, _end_with, (theirs,))
        try:
            own.process.submit(int).result()  # a script without its ``if __name__`` cannot begin
        except BrokenProcessPool:
            if not alive.closed:  # else the sweep was over before
                raise

    def there(attempt: Callable[[Cell, int], Outcome], cell: Cell, retries: int) -> Any:
        try:
            return own.process.submit(_call, dumps(partial(attempt, cell, retries))).result()
        except BrokenProcessPool as error:
            if alive.closed:
                return error
            begin()
            return there(attempt, cell, retries - 1) if retries else error

    with futures.ThreadPoolExecutor(count, initializer=begin) as threads, alive:
        yield lambda *job: threads.submit(there, *job)


def _end_with(pipe: Any) -> None:
    """End this process when the sweep closes its end of a pipe, or is killed."""

    def wait() -> None:
        with contextlib.suppress(EOFError):
            pipe.recv()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
    signal.signal(signal.SIGINT, lambda *_: None)  # the sweep hears Ctrl-C


def _call(text: bytes) -> Any:
    return pickle.loads(text)()


@contextlib.contextmanager
def _cluster(scheduler: str) -> Iterator[Any]:
    """Yield ``submit`` of a Dask cluster; warn where its workers would wait."""
    try:
        distributed = importlib.import_module("distributed")
    except ImportError:
        message = "a sweep on a cluster needs Dask: pip install 'tnreg[scale]'"
        raise OptionError(message, argument="scheduler") from None
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
    with client:
        threads = client.nthreads().values()
        if not threads or max(threads) > 1:
            message = "have more than one thread" if threads else "are not there yet"
            warnings.warn(f"workers {message}; start: dask worker ADDRESS --nthreads 1", stacklevel=2)
        yield client.get_executor(pure=False).submit  # never an older result
