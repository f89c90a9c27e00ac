"""``python -m learned_opt``: see :mod:`learned_opt.symmetry.cli`."""

from learned_opt.symmetry.cli import main

if __name__ == "__main__":
    main()
