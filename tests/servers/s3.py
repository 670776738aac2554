"""An S3-compatible store in a process of its own: moto's server, in memory, with a bucket.

    with s3_store(tmp_path, "papo") as store:
        store.client_environment    # AWS_ENDPOINT_URL and keys, for processes that use it

moto takes any key; whether a store refuses a wrong one is not tested with it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .processes import Server, clean_environment, free_port, serving

KEYS = {
    "AWS_ACCESS_KEY_ID": "papo-test",
    "AWS_SECRET_ACCESS_KEY": "papo-test-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@dataclass
class Store(Server):
    """`bucket` is there once it has started for the first time; what it holds is gone when it ends."""

    bucket: str = ""

    @property
    def variables(self) -> dict[str, str]:
        """What boto3 reads from the environment, and so do MLflow and DVC."""
        return KEYS | {"AWS_ENDPOINT_URL": self.url}

    @property
    def client_environment(self) -> dict[str, str]:
        return clean_environment(self.variables)

    def client(self) -> Any:
        """boto3's client."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3", endpoint_url=self.url, aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"], config=Config(proxies={}),
            aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"], region_name=KEYS["AWS_DEFAULT_REGION"],
        )  # fmt: skip

    def keys(self, prefix: str = "") -> dict[str, int]:
        """The objects of the bucket, and their bytes."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", ())}


@contextmanager
def s3_store(folder: Path, bucket: str) -> Iterator[Store]:
    """A store with one empty bucket."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    store = Store(command, folder, "s3", f"http://127.0.0.1:{port}", "/moto-api/", bucket=bucket)
    with serving(store):
        store.client().create_bucket(Bucket=bucket)
        yield store
