"""`python -m lowrank_lab …`: the command line, as torchrun starts it."""

from lowrank_lab.cli import main

main()
