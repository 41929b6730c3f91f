"""Puts models together by name or from flags, and saves them."""
