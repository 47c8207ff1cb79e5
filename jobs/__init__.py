"""Entry points for `ray job submit`: parse, build the configuration, call the engine."""
