"""Filter, train, evaluate and report: `fifa pipeline` as a job, see `fifa_ray.job`."""

from fifa_ray.job import run_job

if __name__ == "__main__":
    run_job("pipeline")
