"""Clients of S3 that checkpoints are sent with: s3fs, boto3, obstore, the AWS CRT. Fed what torch.save makes."""

from __future__ import annotations

import functools
import io
import os
import tempfile
import urllib.parse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cases.base import Place, case, peer, s3_options
from benchmarks.cases.floors import joined
from benchmarks.cases.pytorch import serialised
from benchmarks.state import State, size_bytes, tensors, view

__all__ = ["boto3_client", "obstore_of", "s3fs_filesystem"]

_REGION = "us-east-1"
_PART_BYTES = 16 << 20


def _tls() -> bool:
    return os.environ["AWS_ENDPOINT_URL"].startswith("https")


@functools.cache
def s3fs_filesystem() -> Any:
    """s3fs, as the environment sets it up."""
    return peer("s3fs").S3FileSystem(**s3_options())


@functools.cache
def boto3_client() -> Any:
    """boto3 with as many connections as it likes."""
    config = peer("botocore.config").Config(s3={"addressing_style": "path"}, max_pool_connections=32)
    certificate = os.environ.get("BENCH_CERTIFICATE")
    return peer("boto3").client(
        "s3", region_name=_REGION, endpoint_url=os.environ["AWS_ENDPOINT_URL"], verify=certificate, config=config
    )


@functools.cache
def obstore_of(bucket: str) -> Any:
    """obstore, set up as the environment says."""
    options = {"allow_http": True} | ({"allow_invalid_certificates": True} if _tls() else {})
    return peer("obstore.store").S3Store(
        bucket,
        endpoint=os.environ["AWS_ENDPOINT_URL"],
        region=_REGION,
        access_key_id=os.environ["AWS_ACCESS_KEY_ID"],
        secret_access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        virtual_hosted_style_request=False,
        client_options=options,
    )


# -- saving ------------------------------------------------------------------------------------------------------


@case("save-s3", "peer")
def s3fs_pipe(state: State, place: Place) -> None:
    """torch.save into memory, then pipe()."""
    s3fs_filesystem().pipe(place.path, serialised(state).getvalue())


@case("save-s3", "peer")
def s3fs_open(state: State, place: Place) -> None:
    """torch.save into an open file of s3fs."""
    with s3fs_filesystem().open(place.path, "wb") as file:
        torch.save(state, file)


@case("save-s3", "peer")
def s3fs_put_file(state: State, place: Place) -> None:
    """torch.save to local disk, then put_file()."""
    with tempfile.NamedTemporaryFile() as file:
        torch.save(state, file.name)
        s3fs_filesystem().put_file(file.name, place.path)


@case("save-s3", "peer")
def boto3_upload(state: State, place: Place) -> None:
    """upload_fileobj of what torch.save made."""
    boto3_client().upload_fileobj(serialised(state), place.bucket, place.key)


@case("save-s3", "peer")
def obstore_put(state: State, place: Place) -> None:
    """put() of what torch.save made, in parts of 16 MiB."""
    peer("obstore").put(obstore_of(place.bucket), place.key, serialised(state), chunk_size=_PART_BYTES)


@case("save-s3", "client")
def obstore_views(state: State, place: Place) -> None:
    """The same client fed the tensors' own bytes: no serialisation, no commit."""
    views = joined([view(tensor) for tensor in tensors(state).values()])
    peer("obstore").put(obstore_of(place.bucket), place.key, iter(views), chunk_size=2 * _PART_BYTES)


@functools.cache
def _crt() -> Any:
    auth, io_, s3 = peer("awscrt.auth"), peer("awscrt.io"), peer("awscrt.s3")
    tls = None
    if _tls():
        options = io_.TlsContextOptions()
        options.verify_peer = False
        tls = io_.ClientTlsContext(options).new_connection_options()
    return s3.S3Client(
        bootstrap=io_.ClientBootstrap.get_or_create_static_default(),
        region=_REGION,
        credential_provider=auth.AwsCredentialsProvider.new_static(
            os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
        ),
        part_size=_PART_BYTES,
        tls_connection_options=tls,
        tls_mode=s3.S3RequestTlsMode.ENABLED if tls else s3.S3RequestTlsMode.DISABLED,
        throughput_target_gbps=25,
    )


def _crt_request(method: str, path: str, body: io.BytesIO | None, on_body: Callable[..., None] | None) -> None:
    http, s3 = peer("awscrt.http"), peer("awscrt.s3")
    headers = [("host", urllib.parse.urlsplit(os.environ["AWS_ENDPOINT_URL"]).netloc)]
    if body is not None:
        headers.append(("content-length", str(body.getbuffer().nbytes)))
    request = http.HttpRequest(method, f"/{path}", http.HttpHeaders(headers), body)
    kind = s3.S3RequestType.PUT_OBJECT if method == "PUT" else s3.S3RequestType.GET_OBJECT
    _crt().make_request(request=request, type=kind, on_body=on_body).finished_future.result()


@case("save-s3", "peer")
def awscrt_put(state: State, place: Place) -> None:
    """The AWS Common Runtime's S3 client, fed what torch.save made."""
    _crt_request("PUT", place.path, serialised(state), None)


# -- loading -----------------------------------------------------------------------------------------------------


def _loaded(file: Any) -> State:
    found: State = torch.load(file, weights_only=True)
    return found


@case("load-s3", "peer")
def s3fs_cat(state: State, place: Place) -> State:
    """cat() into memory, then torch.load."""
    return _loaded(io.BytesIO(s3fs_filesystem().cat(f"{place.path}/pt")))


@case("load-s3", "peer", name="s3fs_open")
def _s3fs_open_load(state: State, place: Place) -> State:
    """torch.load from an open file of s3fs."""
    with s3fs_filesystem().open(f"{place.path}/pt", "rb") as file:
        return _loaded(file)


@case("load-s3", "peer")
def boto3_download(state: State, place: Place) -> State:
    """download_fileobj into memory, then torch.load."""
    buffer = io.BytesIO()
    boto3_client().download_fileobj(place.bucket, f"{place.key}/pt", buffer)
    buffer.seek(0)
    return _loaded(buffer)


@case("load-s3", "peer")
def obstore_get(state: State, place: Place) -> State:
    """get() into memory, then torch.load."""
    return _loaded(io.BytesIO(peer("obstore").get(obstore_of(place.bucket), f"{place.key}/pt").bytes()))


@case("load-s3", "peer")
def awscrt_get(state: State, place: Place) -> State:
    """The AWS Common Runtime's S3 client into memory, then torch.load."""
    buffer = bytearray(size_bytes(state) + (4 << 20))

    def on_body(chunk: bytes, offset: int, **_: object) -> None:
        buffer[offset : offset + len(chunk)] = chunk

    _crt_request("GET", f"{place.path}/pt", None, on_body)
    end = buffer.rfind(b"PK\x05\x06") + 22  # the zip's directory ends the file: cut off the room that was too much
    return _loaded(io.BytesIO(memoryview(buffer)[:end]))
