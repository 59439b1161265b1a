"""One update: incumbent adapter and token rows in, candidate adapter and metrics out."""
