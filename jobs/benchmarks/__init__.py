"""What `python -m jobs.benchmark` measures."""
