"""What a message keeps of the error below it."""


def first_line(error: Exception) -> str:
    """Returns an error's first line, 200 characters at most; its kind if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
