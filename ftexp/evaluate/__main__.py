"""Entry point of `python -m ftexp.evaluate`: see `ftexp.evaluate.command`."""

from ftexp.evaluate.command import main

if __name__ == "__main__":
    main()
