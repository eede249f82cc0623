"""``python -m tnreg.cli``, the same as ``python -m tnreg``."""

from tnreg.cli import main

if __name__ == "__main__":
    main()
