"""How a run ends that can't go on."""


class TrainingError(RuntimeError):
    """Training stopped by what it computed or couldn't write, not by wrong input."""


class Terminated(TrainingError):
    """SIGTERM stopped training; its state is saved."""

    exit_status = 143  # a shell's status of a process that SIGTERM ended
