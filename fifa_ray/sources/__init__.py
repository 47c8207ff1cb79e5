"""Preference datasets: what is in them (metadata) and how to get at their images.

    source = open_source(config.ingest, config.images)
    for chunk in source.chunks():                # units of metadata reading, picklable
        rows = source.read_metadata(chunk)       # METADATA: a row per pair, or per bad row
    for batch in source.read_images(file, group, requests):
        ...                                      # IMAGES: encoded bytes, or a reason why not

No Ray here: a source is a small picklable object that workers use.
"""

from fifa_ray.sources.detect import open_source
from fifa_ray.sources.sample import SampledSource, count_rows
from fifa_ray.sources.source import IMAGES, METADATA, REQUESTS, Source, SourceChunk
from fifa_ray.sources.staging import stage_table

__all__ = [
    "IMAGES",
    "METADATA",
    "REQUESTS",
    "SampledSource",
    "Source",
    "SourceChunk",
    "count_rows",
    "open_source",
    "stage_table",
]
