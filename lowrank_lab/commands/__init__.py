"""The commands of `lowrank-lab`, one file per command or group of commands."""
