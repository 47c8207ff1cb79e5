"""The embedded default: a small drawn world with a known truth, and tiny real models."""
