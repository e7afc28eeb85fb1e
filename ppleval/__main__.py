"""`python -m ppleval` is the command `ppleval`."""

from ppleval.cli.main import run_and_exit

run_and_exit()
