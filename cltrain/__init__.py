"""cltrain: a deployed LLM agent keeps learning from its own work, within limits that its owner sets and can see."""

__version__ = "0.1.0"
