"""``python -m lightning_ep``: the command line."""

from lightning_ep.cli import main

if __name__ == "__main__":
    main()
