"""Entry point of `python -m ftexp.predict`: see `ftexp.predict.command`."""

from ftexp.predict.command import main

if __name__ == "__main__":
    main()
