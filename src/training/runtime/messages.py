"""Shortens underlying errors for messages."""


def first_line(error: Exception) -> str:
    """Returns the first line of an error, at most 200 characters; its class name if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
