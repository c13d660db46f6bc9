"""Where a client finds a picture that was written for it."""

from __future__ import annotations

from gtl.storage import Store, s3_endpoint

S3 = "s3://"


def link(store: Store, key: str, seconds: int) -> str:
    """What anybody may fetch the object with for so long, by HTTP: signed on S3 (the extra `s3`); elsewhere its place.

    Nothing is asked of the store.
    """
    if not store.root.startswith(S3):
        return store.url(key)
    try:
        import boto3
    except ModuleNotFoundError:
        return store.url(key)
    bucket, _, name = store.path(key).partition("/")
    client = boto3.client("s3", endpoint_url=s3_endpoint())
    signed: str = client.generate_presigned_url(
        "get_object", Params={"Bucket": bucket, "Key": name}, ExpiresIn=seconds
    )  # fmt: skip
    return signed
