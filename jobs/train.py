"""Align a model with the pairs that a run kept: `fifa train` as a job, see `fifa_ray.job`."""

from fifa_ray.job import run_job

if __name__ == "__main__":
    run_job("train")
