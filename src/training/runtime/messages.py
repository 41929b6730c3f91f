"""The part of an underlying error that a message keeps."""


def first_line(error: Exception) -> str:
    """Returns an error's first line, 200 characters at most; its class if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
