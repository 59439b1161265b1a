"""The frozen base, its chat template, and the adapter as a file."""
