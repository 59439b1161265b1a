"""Servers that hold the base and the adapters they were told to load."""
