"""``python -m tnreg``, and ``torchrun --nproc-per-node N -m tnreg run locality``."""

from tnreg.cli import main

if __name__ == "__main__":
    main()
