"""Infrastructure of a process: ranks, signals, the watchdog, logs, files."""
