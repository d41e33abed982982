"""Entry point of `python -m ftexp.doctor`: see `ftexp.doctor.command`."""

from ftexp.doctor.command import main

if __name__ == "__main__":
    main()
