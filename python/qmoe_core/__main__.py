"""`python -m qmoe_core` is `qmoe`."""

from .cli import main

if __name__ == "__main__":
    main()
