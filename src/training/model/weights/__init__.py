"""Reads weights files of many formats, converts their names, loads and identifies weights."""
