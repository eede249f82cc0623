"""Pictures are drawn without a screen, in the processes that tests start as well."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")
