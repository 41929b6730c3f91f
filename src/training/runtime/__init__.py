"""The process, not the problem: ranks, signals, the watchdog, logs, files."""
