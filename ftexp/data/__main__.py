"""Entry point of `python -m ftexp.data`: see `ftexp.inspecting.command`."""

from ftexp.inspecting.command import main

if __name__ == "__main__":
    main()
