"""Adapters that make other people's networks look alike; heavy imports inside."""
