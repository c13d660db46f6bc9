"""The one door to local folders and buckets."""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gtl.types import UserError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

CHUNK = 4 * 2**20
"""Bytes held at a time while copying."""
CONNECT_S = 5
SILENCE_S = 15
"""So long a bucket may send and take nothing before a request has failed. The clock starts late: curl's rate of an
upload is a mean over seconds."""
ATTEMPTS = 3
"""Of a request to a bucket: one that never answers is given up within two minutes or so."""
GOOGLE = ("gs", "gcs")
"""What URLs of Google's buckets begin with."""
GOOGLE_S = 60
"""After so long a request to one of these is not begun again; its client would go on for a quarter of an hour."""
GOOGLE_EMULATOR = "STORAGE_EMULATOR_HOST"
"""In the environment: the URL of a server that stands in for Google's, and asks for no credentials."""
AZURE = ("abfs", "abfss")
NO_BUCKET = "there is no such bucket; create it or correct the URL"


class Store:
    """Objects under a root: a local folder, or a URL that pyarrow or fsspec opens (s3://, gs://, hf://, ...).

    Keys are relative, with forward slashes. A write is all or nothing: a reader sees the old object or the new one.
    Every method raises UserError, naming the place, when the disk is full or the store cannot be reached.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        """Nothing is contacted until the first call.

        Raises:
            UserError: the URL names no bucket.
        """
        scheme, separator, rest = os.fspath(root).partition("://")
        if scheme in ("s3", *GOOGLE) and separator and not rest.partition("/")[0]:
            raise UserError(f"{root}: names no bucket; expected {scheme}://BUCKET/FOLDER")
        self.root = os.fspath(root).rstrip("/") or "/"
        self.is_local = "://" not in self.root or self.root.startswith("file://")
        if self.is_local:
            self.root = os.path.abspath(os.path.expanduser(self.root.removeprefix("file://")))
        self._opened: tuple[FileSystem, str] | None = None

    def __repr__(self) -> str:
        return f"Store({self.root!r})"

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.root,)

    def sub(self, key: str) -> Store:
        """The store under a key."""
        return Store(self.url(key))

    def url(self, key: str = "") -> str:
        """Where an object is, for messages and for other programs."""
        return f"{self.root.rstrip('/')}/{key}" if key else self.root

    @property
    def fs(self) -> FileSystem:
        """The pyarrow filesystem behind the store."""
        return self._open()[0]

    def path(self, key: str = "") -> str:
        """An object's path inside `fs`."""
        base = self._open()[1]
        return f"{base.rstrip('/')}/{key}" if key else base

    def read(self, key: str) -> bytes:
        """An object's bytes, of one moment also where it is replaced at that moment.

        Raises:
            FileNotFoundError: there is none.
        """
        with self._explained(key):
            while True:
                with self.fs.open_input_stream(self.path(key)) as stream:
                    before, data = stream.metadata(), stream.read()
                # A bucket is asked for an object's length, and then for so many bytes of what may be a longer one.
                if self.is_local or self._metadata(key) == before:
                    return data

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        """Part of an object; less than `length` where it ends before.

        Raises:
            FileNotFoundError: there is none.
        """
        with self._explained(key), self.fs.open_input_file(self.path(key)) as file:
            return file.read_at(length, offset)

    def write(self, key: str, data: bytes) -> None:
        """Create or replace an object."""
        with self._explained(key):
            if self.is_local:
                with replacing(self.path(key)) as temporary:
                    temporary.write_bytes(data)
            else:
                self._put(key, data)

    def upload(self, source: str | os.PathLike[str], key: str) -> None:
        """Copy a local file to a key."""
        with self._explained(key):
            if self.is_local:
                with replacing(self.path(key)) as temporary:
                    shutil.copyfile(source, temporary)
            else:
                from pyarrow import memory_map

                with memory_map(os.fspath(source)) as file:
                    self._put(key, file.read_buffer())

    def _metadata(self, key: str) -> Any:
        with self.fs.open_input_stream(self.path(key)) as stream:
            return stream.metadata()

    def _put(self, key: str, data: Any) -> None:
        """Write an object of a bucket in one call: a stream that is left by an error before its end completes the
        upload with half the bytes, and pyarrow's own `copy_files` does not say when its last parts were lost."""
        try:
            with self.fs.open_output_stream(self.path(key)) as stream:
                stream.write(data)
        except FileNotFoundError as error:  # Google's answer to a write
            raise UserError(f"{self.url(key)}: {NO_BUCKET}") from error

    def create(self, key: str, data: bytes) -> bool:
        """Write an object only if there is none; whether this call made it.

        Of several writers exactly one makes it on a local disk, and on S3 where boto3 is installed (the extra `s3`);
        elsewhere two that come at the same moment may both.
        """
        with self._explained(key):
            if self.is_local:
                return create_file(self.path(key), data)
            if self.root.startswith("s3://"):
                try:
                    return create_s3_object(self.path(key), data)
                except ModuleNotFoundError as error:
                    if error.name != "boto3":
                        raise
        if self.exists(key):
            return False
        self.write(key, data)
        return True

    def download(self, key: str, target: str | os.PathLike[str]) -> Path:
        """Copy an object to a local file, which appears complete or not at all.

        Raises:
            FileNotFoundError: there is no such object.
        """
        with self._explained(key), self.fs.open_input_stream(self.path(key)) as source:
            with explained(os.fspath(target)), replacing(target) as temporary, temporary.open("wb") as sink:
                shutil.copyfileobj(source, sink, CHUNK)
        return Path(target)

    def exists(self, key: str) -> bool:
        """Whether there is an object."""
        from pyarrow.fs import FileType

        with self._explained(key):
            return bool(self.fs.get_file_info(self.path(key)).type == FileType.File)

    def list(self, prefix: str = "", recursive: bool = True) -> Iterator[tuple[str, int, int]]:
        """(key, bytes, modification time in ns) of the objects under a folder, sorted; none if there is no folder."""
        from pyarrow.fs import FileType

        skip = len(self.path().rstrip("/")) + 1
        for info in self._select(prefix, recursive):
            if info.type == FileType.File and not is_temporary(info.base_name):
                yield info.path[skip:], info.size or 0, info.mtime_ns or 0

    def folders(self, prefix: str = "") -> Sequence[str]:
        """Names of the folders directly under a folder, sorted; none if there is no folder."""
        from pyarrow.fs import FileType

        if self._is_google:  # pyarrow names only folders that have an object of their own there, which nothing makes
            skip = len(self.path(prefix).rstrip("/")) + 1
            inside = [info.path[skip:].partition("/") for info in self._select(prefix, True)]
            return sorted({name for name, slash, _ in inside if slash})
        return [info.base_name for info in self._select(prefix, False) if info.type == FileType.Directory]

    def delete(self, key: str) -> None:
        """Remove an object; it may be gone already."""
        with self._explained(key):
            try:
                self.fs.delete_file(self.path(key))
            except FileNotFoundError:
                return

    def delete_folder(self, prefix: str) -> None:
        """Remove everything under a folder; it may be gone already."""
        with self._explained(prefix):
            try:
                if (
                    self._is_google
                ):  # has no folders to leave, and says of one that is gone what is no FileNotFoundError
                    self.fs.delete_dir_contents(self.path(prefix), missing_dir_ok=True)
                else:
                    self.fs.delete_dir(self.path(prefix))
            except FileNotFoundError:
                return

    @property
    def _is_google(self) -> bool:
        return self.root.partition("://")[0] in GOOGLE

    def _open(self) -> tuple[FileSystem, str]:
        if self._opened is None:
            with self._explained():
                self._opened = open_filesystem(self.root)
        return self._opened

    def _select(self, prefix: str, recursive: bool) -> Sequence[Any]:
        from pyarrow.fs import FileSelector

        with self._explained(prefix):
            try:
                # allow_not_found also takes a bucket that does not exist for an empty one; Google's needs it, since
                # what is said otherwise is no FileNotFoundError.
                where = FileSelector(self.path(prefix), allow_not_found=self._is_google, recursive=recursive)
                infos = self.fs.get_file_info(where)
                if not infos and self._is_google:
                    self._check_bucket(prefix)
                return sorted(infos, key=lambda info: info.path)
            except FileNotFoundError:
                return []
            except UnicodeDecodeError as error:
                raise UserError(f"{self.url(prefix)}: a file name in it is not UTF-8: {error.object!r}") from error

    def _check_bucket(self, prefix: str) -> None:
        """Refuse one that is not there, where listing takes it for empty."""
        from pyarrow.fs import FileType

        if self.fs.get_file_info(self.path().partition("/")[0]).type == FileType.NotFound:
            raise UserError(f"{self.url(prefix)}: {NO_BUCKET}")

    def _explained(self, key: str = "") -> AbstractContextManager[None]:
        return explained(self.url(key))


def open_filesystem(url: str) -> tuple[FileSystem, str]:
    """A pyarrow filesystem and the path inside it. S3 endpoints and credentials come from their usual places.

    Raises:
        UserError: nothing that is installed opens such a URL.
    """
    from pyarrow import fs

    if "://" not in url:
        return fs.LocalFileSystem(), url
    scheme, _, rest = url.partition("://")
    if scheme in ("s3", *GOOGLE) and "?" in rest:
        raise UserError(f"{url}: a bucket URL has no '?'; endpoint, region and credentials come from the environment")
    if scheme in GOOGLE:
        limit, emulator = timedelta(seconds=GOOGLE_S), os.environ.get(GOOGLE_EMULATOR)
        if not emulator:
            return fs.GcsFileSystem(retry_time_limit=limit), rest
        protocol, separator, host = emulator.rstrip("/").rpartition("://")
        return fs.GcsFileSystem(
            anonymous=True, scheme=protocol if separator else "http", endpoint_override=host, retry_time_limit=limit
        ), rest  # fmt: skip
    if scheme in AZURE and not any(name.startswith("AZURE_") for name in os.environ) and shutil.which("az") is None:
        raise UserError(f"{url}: no credentials for Azure; {ADVICE[scheme]}")  # pyarrow's client would end the process
    if scheme == "s3":
        retries = fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS)
        options = {"endpoint_override": endpoint} if (endpoint := s3_endpoint()) else {}
        return fs.S3FileSystem(
            connect_timeout=CONNECT_S, request_timeout=SILENCE_S, retry_strategy=retries, **options
        ), rest  # fmt: skip
    try:
        filesystem, base = fs.FileSystem.from_uri(url)
    except (ValueError, NotImplementedError):
        import fsspec

        try:
            remote, base = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UserError(f"{url}: no filesystem for {scheme}:// is installed ({error})") from error
        filesystem = fs.PyFileSystem(fs.FSSpecHandler(remote))
    return filesystem, base


def s3_endpoint() -> str | None:
    """The S3 server that the environment names; None for Amazon's own. pyarrow does not read these variables."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def create_s3_object(path: str, data: bytes) -> bool:
    """Put `bucket/key` if there is none, which pyarrow cannot ask for; whether it was made."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, key = path.partition("/")
    config = Config(connect_timeout=CONNECT_S, read_timeout=SILENCE_S, retries={"total_max_attempts": ATTEMPTS})
    client = boto3.session.Session().client("s3", endpoint_url=s3_endpoint(), config=config)  # threads share no session
    try:
        client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
    except ClientError as error:
        if error.response["Error"]["Code"] in ("PreconditionFailed", "ConditionalRequestConflict"):
            return False
        raise OSError(str(error)) from error
    except BotoCoreError as error:
        raise OSError(str(error)) from error
    return True


def create_file(path: str, data: bytes) -> bool:
    """Make a local file if there is none, complete from its first moment; whether it was made."""
    temporary = temporary_beside(path)
    try:
        temporary.write_bytes(data)
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


@contextmanager
def replacing(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside the target to write to: it becomes the target if the block ends well, and goes if it does not."""
    temporary = temporary_beside(target)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # or a machine that loses power may keep the name without what is in it
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_beside(target: str | os.PathLike[str]) -> Path:
    """A new path in the target's folder, which is made; processes and machines do not share one."""
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def is_temporary(name: str) -> bool:
    """Whether a file is one that `temporary_beside` named, left behind by a process that was killed."""
    return re.fullmatch(r"\..+\.[0-9a-f]{32}\.tmp", name) is not None


ADVICE = {
    "s3": "check the URL, AWS_ENDPOINT_URL and the credentials",
    **dict.fromkeys(GOOGLE, "check the URL and Google's credentials"),
    **dict.fromkeys(AZURE, "set AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET, or install az and log in"),
    "hf": "check the URL, HF_TOKEN and that the hub can be reached",
}
"""What to look at where a store refuses, by what its URLs begin with."""


@contextmanager
def explained(place: str) -> Iterator[None]:
    """Turn what goes wrong with a place itself into one line that names it."""
    try:
        yield
    except (FileNotFoundError, UserError):
        raise
    except OSError as error:
        raise UserError(f"{place}: {explain(error, place)}") from error
    except Exception as error:
        # Client libraries of remote stores raise errors of kinds of their own. What Python itself raises is ours, and a
        # ValueError, such as pyarrow's, is about what is in an object.
        if "://" not in place or isinstance(error, ValueError) or type(error).__module__ == "builtins":
            raise
        raise UserError(f"{place}: {explain(error, place)}") from error


def explain(error: Exception, place: str) -> str:
    """What happened and what would be right, without the noise of a client library."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free some space and go on with --resume"
    text = " ".join(str(error).split()) or type(error).__name__
    if "://" not in place:
        return (isinstance(error, OSError) and error.strerror) or text
    if "NO_SUCH_BUCKET" in text or "NoSuchBucket" in text:
        return NO_BUCKET
    reason = re.split(r"; Details:| \(Request ID| error_info=", text.rpartition("AWS Error ")[2])[0][:300]
    advice = ADVICE.get(place.partition("://")[0], "check the URL and the credentials")
    return f"the store cannot be reached or refuses ({reason}); {advice}"
