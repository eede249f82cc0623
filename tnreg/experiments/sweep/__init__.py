"""Sweeps: one function over many settings, on this machine's processors or on a Dask cluster.

Every cell of a sweep is a run folder inside the sweep's folder and is written whole. What is there is
not computed again, so a sweep that was killed goes on when it is started again. A cell that fails is
tried again, then reported, and stops none of the others. At the end there are ``results.csv`` with one
row a cell, ``config.json`` with the same rows, their means over seeds and what failed, and a picture.

Processes of Python compute on this machine; a Dask cluster needs ``pip install 'tnreg[scale]'``.
"""

from tnreg.experiments.sweep.cell import Work, cell_name
from tnreg.experiments.sweep.experiment import Experiment, Failed, Result, run

__all__ = ["Experiment", "Failed", "Result", "Work", "cell_name", "run"]
