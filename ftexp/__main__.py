"""`python -m ftexp <command> ...`, or `ftexp <command> ...`: the same as `python -m ftexp.<command> ...`.

Without a command, or with --help, the commands are listed.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from ftexp import __version__
from ftexp.cli.wrapping import print_wrapped
from ftexp.registry import did_you_mean

COMMANDS = {
    "train": "train a model, or resume; -m for a sweep",
    "data": "inspect the data of a run",
    "evaluate": "evaluate a checkpoint of a run",
    "predict": "predict classes for any number of images",
    "export": "export a model to safetensors, torch.export or ONNX",
    "report": "write report.html of a run or a sweep",
    "checkpoints": "list, verify and compare a run's checkpoints",
    "sweeps": "print the leaderboard of a sweep",
    "doctor": "check what a run needs before it starts",
    "deploy": "write files to run it on Slurm, Kubernetes or SkyPilot",
    "dashboard": "print a Grafana dashboard for tracker=prometheus",
    "drill": "inject faults into a run, and compare it with a clean one",
}


def main() -> None:
    """Run the command named by the first argument; exit with 2 if there is no such command."""
    name, *_ = [*sys.argv[1:], "--help"]
    if name in ("-h", "--help"):
        print("usage: ftexp <command> ...\n")
        print("\n".join(f"  {command:<12} {what}" for command, what in COMMANDS.items()))
        print("\nftexp <command> --help prints its options.")
    elif name == "--version":
        print(f"ftexp {__version__}")
    elif name not in COMMANDS:
        known = f"Commands: {', '.join(COMMANDS)}"
        print_wrapped([f"ftexp: {name} is not a command.{did_you_mean(name, COMMANDS)} {known}"], sys.stderr)
        sys.exit(2)
    else:
        del sys.argv[1]
        if not sys.flags.safe_path:
            sys.path[0] = str(Path.cwd())  # as under `python -m`; the console script has its own directory here
        runpy.run_module(f"ftexp.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
