"""The mathematics of preference training: torch in, torch out; no Ray, no model, no settings."""
