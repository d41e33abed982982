"""Entry point of `python -m ftexp.deploy`: see `ftexp.deploy.command`."""

from ftexp.deploy.command import main

if __name__ == "__main__":
    main()
