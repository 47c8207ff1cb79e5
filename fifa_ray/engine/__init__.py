"""The stages, on Ray: the only folder that imports it."""
