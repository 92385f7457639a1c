"""What can go wrong, by the exit code it leads to."""


class ConversionError(ValueError):
    """A failure the person at the command line can act on; `exit_code` is what the process ends with."""

    exit_code = 1


class InputError(ConversionError):
    """The checkpoint is damaged, incomplete, of another model, or cannot be read or written (exit 1)."""


class UsageError(ConversionError):
    """The command's words are off, or one is missing (exit 2)."""

    exit_code = 2


class VerificationError(ConversionError):
    """Two checkpoints, or a checkpoint and its manifest, differ (exit 3)."""

    exit_code = 3
