"""Experiments: each a module with a frozen ``Config``, ``run(config, folder)`` and ``figure(folder)``."""
