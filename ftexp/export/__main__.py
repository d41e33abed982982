"""Entry point of `python -m ftexp.export`: see `ftexp.export.command`."""

from ftexp.export.command import main

if __name__ == "__main__":
    main()
