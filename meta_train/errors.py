"""What a user can mend: errors whose message is one line that says why, and what to do."""


class UsageError(ValueError):
    """What is asked for cannot be done."""


class UnknownName(UsageError):
    """A name that stands for nothing; the message lists the valid ones, or says what to do."""


def at_least_one(**counts: int) -> None:
    """Raises UsageError for a count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"{name} must be 1 or more, not {count}.")
