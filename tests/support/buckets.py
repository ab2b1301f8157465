"""Servers with buckets on this machine: S3 and Google Cloud Storage by moto, S3 by Ceph, Azure by Azurite.

Each is yielded as the URL of a bucket, which the environment variables name the server of.
"""

import base64
import hashlib
import hmac
import http.client
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.utils import formatdate

import boto3
import pytest
from moto.server import ThreadedMotoServer

from tests.support import rados_gateway
from tests.support.ports import free_port
from tests.support.request_proxy import RequestProxy

BUCKET = "runs"
# The account that Azurite has, by its documentation.
AZURITE_ACCOUNT = "devstoreaccount1"
AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """These environment variables while this lasts."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def moto_server() -> Iterator[int]:
    """A server with S3 and one bucket, in threads of this process. Yields its port."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        _, port = server.get_host_and_port()
        _request(port, "PUT", f"/{BUCKET}")
        yield port
    finally:
        server.stop()


@contextmanager
def s3_in_process() -> Iterator[str]:
    """A bucket on S3 whose server is a process of its own, by the environment."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        await_port(port)
        _request(port, "PUT", f"/{BUCKET}")
        with environment(**s3_variables(f"http://127.0.0.1:{port}")):
            yield f"s3://{BUCKET}"
    finally:
        server.terminate()
        server.wait()


@contextmanager
def ceph_bucket() -> Iterator[str]:
    """A bucket on Ceph's S3 gateway, by the environment. Skips the test where Ceph is not installed (Debian: `radosgw
    ceph-mon ceph-osd ceph-common`; as root)."""
    if not rados_gateway.is_installed():
        pytest.skip("Ceph is not installed")
    with rados_gateway.started() as url:
        await_port(int(url.rsplit(":")[-1]))
        keys = {"AWS_ACCESS_KEY_ID": rados_gateway.KEY, "AWS_SECRET_ACCESS_KEY": rados_gateway.SECRET}
        with environment(**dict(s3_variables(url)) | keys):
            boto3.client("s3", "us-east-1", endpoint_url=url).create_bucket(Bucket=BUCKET)
            yield f"s3://{BUCKET}"


@contextmanager
def s3_bucket() -> Iterator[tuple[str, RequestProxy]]:
    """A bucket on S3 behind a proxy, by the environment."""
    with moto_server() as port, RequestProxy(port) as proxy, environment(**s3_variables(proxy.url)):
        yield f"s3://{BUCKET}", proxy


@contextmanager
def iam_bucket() -> Iterator[str]:
    """A bucket on S3 that checks access keys and signatures, with good ones in the environment."""
    with moto_server() as port:
        url = f"http://127.0.0.1:{port}"
        iam = boto3.client("iam", "us-east-1", endpoint_url=url, aws_access_key_id="root", aws_secret_access_key="root")
        iam.create_user(UserName="runs")
        allowed = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
        iam.put_user_policy(UserName="runs", PolicyName="runs", PolicyDocument=json.dumps(allowed))
        key = iam.create_access_key(UserName="runs")["AccessKey"]
        good = dict(s3_variables(url))
        good |= {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}
        _request(port, "POST", "/moto-api/reset-auth", b"0")
        try:
            with environment(**good):
                yield f"s3://{BUCKET}"
        finally:
            _request(port, "POST", "/moto-api/reset-auth", b"inf")


def s3_variables(url: str) -> Mapping[str, str]:
    """The environment of a client of an S3 server."""
    return {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "AWS_ALLOW_HTTP": "true",
        "NO_PROXY": "127.0.0.1",
    }


@contextmanager
def gcs_bucket() -> Iterator[str]:
    """A bucket by the protocol of Google Cloud Storage, which is that of S3 but for the header of a condition."""
    with moto_server() as port, RequestProxy(port) as proxy:
        variables = {"GOOGLE_BASE_URL": proxy.url, "GOOGLE_BEARER_TOKEN": "token", "GOOGLE_ALLOW_HTTP": "true"}
        with environment(**variables, NO_PROXY="127.0.0.1"):
            yield f"gs://{BUCKET}"


@contextmanager
def azure_bucket() -> Iterator[str]:
    """A container on Azure. Skips the test where Azurite is not installed (`npm install -g azurite`)."""
    program = shutil.which("azurite-blob")
    if program is None:
        pytest.skip("Azurite is not installed")
    port = free_port()
    options = [
        "--blobPort",
        str(port),
        "--silent",
        "--skipApiVersionCheck",
        "--inMemoryPersistence",
        "--disableTelemetry",
    ]
    server = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
    try:
        await_port(port)
        _create_container(port)
        with environment(
            AZURE_STORAGE_ACCOUNT_NAME=AZURITE_ACCOUNT,
            AZURE_STORAGE_ACCOUNT_KEY=AZURITE_KEY,
            AZURE_STORAGE_ENDPOINT=f"http://127.0.0.1:{port}/{AZURITE_ACCOUNT}",
            AZURE_ALLOW_HTTP="true",
            NO_PROXY="127.0.0.1",
        ):
            yield f"az://{BUCKET}"
    finally:
        server.terminate()
        server.wait()


def _create_container(port: int) -> None:
    date, version = formatdate(usegmt=True), "2021-12-02"
    path = f"/{AZURITE_ACCOUNT}/{BUCKET}"
    resource = f"/{AZURITE_ACCOUNT}{path}\nrestype:container"
    signed = "PUT" + 12 * "\n" + f"x-ms-date:{date}\nx-ms-version:{version}\n{resource}"
    digest = hmac.new(base64.b64decode(AZURITE_KEY), signed.encode(), hashlib.sha256).digest()
    headers = {
        "x-ms-date": date,
        "x-ms-version": version,
        "Authorization": f"SharedKey {AZURITE_ACCOUNT}:{base64.b64encode(digest).decode()}",
    }
    _request(port, "PUT", f"{path}?restype=container", b"", headers)


def _request(port: int, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] = {}) -> None:
    server = http.client.HTTPConnection("127.0.0.1", port, timeout=30.0)
    server.request(method, path, body, dict(headers))
    answer = server.getresponse()
    assert answer.status in (200, 201), answer.read()
    server.close()


def await_port(port: int, timeout_s: float = 60.0) -> None:
    """Return once a server listens there. AssertionError if none does within `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
            return
        except OSError:
            assert time.monotonic() < deadline_s, "the server has not started"
            time.sleep(0.05)
