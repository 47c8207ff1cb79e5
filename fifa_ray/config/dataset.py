"""Settings of the dataset: where its rows and images are, and what is refused of them."""

from typing import Literal

from pydantic import Field

from fifa_ray.config.sections import Section


class IngestConfig(Section):
    """Where the preference dataset is and how its rows become pairs."""

    source: str = Field(
        description="Folder, file or glob with the dataset: a local path or a URI (s3://, gs://, "
        "hf://datasets/OWNER/NAME, ...)."
    )
    format: Literal[
        "auto", "pickapic", "hpdv2", "hpdv3", "imagereward", "generic", "webdataset"
    ] = Field("auto", description="Layout of the dataset; auto recognises it by names and columns.")
    image_root: str | None = Field(
        None, description="Folder that image paths are relative to; null means the dataset's own."
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="For the generic format: your column for each of prompt, chosen, rejected, "
        "chosen_uid, rejected_uid, source_id.",
    )
    max_prompt_chars: int = Field(
        2000, ge=1, description="Longer prompts are quarantined (characters)."
    )
    drop_duplicates: bool = Field(
        True, description="Quarantine a row that repeats another's prompt, images and choice."
    )
    max_pairs: int | None = Field(
        None, ge=1, description="Stop after about this many source rows; null reads everything."
    )
    rows_per_part: int = Field(
        100_000, ge=100, description="Source rows per part of pairs/: the unit of work and resume."
    )


class ImagesConfig(Section):
    """How images are fetched and decoded, and what is refused."""

    max_pixels: int = Field(
        64_000_000, ge=1, description="Larger images are quarantined before decoding (pixels)."
    )
    max_bytes: int = Field(
        64_000_000, ge=1, description="Larger files are quarantined before reading (bytes)."
    )
    allow_urls: bool = Field(
        False, description="Fetch images that are http(s) URLs; never from private addresses."
    )
    url_timeout_seconds: float = Field(10.0, gt=0, description="Time limit of one URL fetch.")
