"""Entry points for `ray job submit`, each a command of `fifa`; benchmarks and studies."""
