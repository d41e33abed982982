"""Entry point of `python -m ftexp.drill`: see `ftexp.drill.command`."""

from ftexp.drill.command import main

if __name__ == "__main__":
    main()
