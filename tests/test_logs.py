import json
import logging
import subprocess
import sys

import pytest

from fifa_ray.logs import JsonFormatter, log_context


def lines_of(work) -> list[dict]:
    """What a logger writes as JSON while `work(logger)` runs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(JsonFormatter().format(record))
    logger = logging.Logger("fifa_ray.engine.test", logging.INFO)
    logger.addHandler(handler)
    work(logger)
    return [json.loads(line) for line in lines]


def test_a_line_says_its_run_stage_and_part():
    def work(logger):
        logger.info("before")
        with log_context(run="mine", stage="rewards/clip"):
            logger.info("%s of %s", "3", "4")
            with log_context(stage="selected"):
                logger.warning("cut short", extra={"part": "part-000001.parquet"})
            logger.info("again", extra={"stage": "pairs"})

    before, counted, cut, again = lines_of(work)
    assert "run" not in before
    assert "stage" not in before
    assert (counted["run"], counted["stage"], counted["message"]) == (
        "mine",
        "rewards/clip",
        "3 of 4",
    )
    assert (cut["stage"], cut["part"], cut["level"]) == (
        "selected",
        "part-000001.parquet",
        "warning",
    )
    assert again["stage"] == "pairs"
    assert again["time"].endswith("Z")


def test_a_message_of_several_lines_and_its_exception_stay_one_line():
    def work(logger):
        try:
            raise ValueError("two\nlines")
        except ValueError:
            logger.exception("a\nb")

    (line,) = lines_of(work)
    assert line["message"] == "a\nb"
    assert "ValueError: two\nlines" in line["exception"]


@pytest.mark.parametrize(("option", "is_json"), [("json", True), ("text", False)])
def test_the_command_line_chooses_the_format(option, is_json):
    code = (
        "import logging; from fifa_ray.cli import main; import click\n"
        "@main.command('say')\n"
        "def say(): logging.getLogger('fifa_ray').info('hello')\n"
        f"main(['--log-format', '{option}', 'say'])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    last = said.stderr.splitlines()[-1]
    if is_json:
        assert json.loads(last)["message"] == "hello"
    else:
        assert last[8:] == " hello"
