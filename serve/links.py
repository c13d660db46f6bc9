"""Where a client finds a picture that was written for it."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

from gtl.storage import Store, s3_endpoint

S3 = "s3://"


def link(store: Store, key: str, seconds: int) -> str:
    """What anybody may fetch the object with for so long, by HTTP: signed on S3 (the extra `s3`); elsewhere its place.

    Nothing is asked of the store.
    """
    if not store.root.startswith(S3):
        return store.url(key)
    if find_spec("boto3") is None:
        return store.url(key)
    bucket, _, name = store.path(key).partition("/")
    signed: str = client(s3_endpoint()).generate_presigned_url(
        "get_object", Params={"Bucket": bucket, "Key": name}, ExpiresIn=seconds
    )  # fmt: skip
    return signed


@cache
def client(endpoint: str | None) -> Any:
    """Of an S3 server, for all pictures: making one reads its description from files."""
    import boto3

    return boto3.client("s3", endpoint_url=endpoint)
