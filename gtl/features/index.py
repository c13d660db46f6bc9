"""Pictures found by a picture, or by words: an index in a folder, of frozen features of them or of their captions."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gtl.backbones.base import TextBackbone
from gtl.backbones.features import features_of
from gtl.data.captions import CaptionRule
from gtl.data.check import inspect_here
from gtl.data.containers import fetch
from gtl.data.sources import Located, scan
from gtl.families.files import read_json
from gtl.features.network import Reader, open_network
from gtl.images import BrokenImage, decode
from gtl.storage import Store
from gtl.types import Progress, UserError, quiet

if TYPE_CHECKING:
    from torch import Tensor

    from gtl.backbones.base import Backbone

FACTS, VECTORS, IMAGES = "index.json", "vectors.faiss", "images.jsonl"
EXACT = 100_000
"""Pictures up to which every one is compared with; more are searched by a graph, which misses a few."""
LINKS = 32
"""Of a picture in the graph (HNSW, Malkov & Yashunin 2016, arXiv 1603.09320)."""


@dataclass(frozen=True)
class Match:
    """A picture that was found."""

    uri: str
    cosine: float
    """Of the two features; 1 is the same direction."""


def make_index(source: str, out: Path, backbone: str, cache: str, progress: Progress = quiet) -> int:
    """Index the pictures of a source; how many there are.

    Features are kept in the cache, by the backbone's weights and the bytes of the picture or caption: to index a folder
    again costs what is new in it.

    Args:
        source: A folder, a Parquet or tar file, a bucket URL of one, or a built-in set.
        out: A folder for the index; an index that is there is replaced.
        backbone: See `gtl.features.network.open_network`; where it reads, pictures are found by their captions.
        cache: URL of the cache's root.
        progress: Is called as it goes on.

    Raises:
        UserError: there is no such source or backbone, faiss is not installed, or nothing can be read.
    """
    faiss = library()
    store = Store(cache)
    network = open_network(backbone)
    reads = isinstance(network, Reader)
    found = scan(source, CaptionRule("own" if reads else "folder"), 1.0, store, inspect_here, progress)
    images = {located.record.sha256: located for located in found.images}
    whole = [located for located in images.values() if (any(captions_of(located)) if reads else readable(located))]
    if not whole:
        lack = "has a caption of its own" if reads else "can be read"
        raise UserError(f"{source}: none of {len(found.images) + len(found.broken)} images {lack}")
    each = [len(captions_of(located)) if reads else 1 for located in whole]
    uris = [located.record.uri for located, number in zip(whole, each, strict=True) for _ in range(number)]
    vectors = units(vectors_of(network, whole, store, progress)).numpy()
    if len(uris) <= EXACT:
        index = faiss.IndexFlatIP(vectors.shape[1])
    else:
        index = faiss.IndexHNSWFlat(vectors.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
    index.add(vectors)
    out.mkdir(parents=True, exist_ok=True)
    faiss.write_index(index, str(out / VECTORS))
    (out / IMAGES).write_text("".join(json.dumps(uri) + "\n" for uri in uris), encoding="utf-8")
    place = Path(backbone).expanduser()
    backbone = str(place.resolve()) if place.is_dir() else backbone
    facts = {"backbone": backbone, "fingerprint": network.fingerprint(), "images": len(whole), "source": source}
    (out / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return len(whole)


def find(index: Path, wanted: str, is_text: bool = False, most: int = 10) -> list[Match]:
    """The pictures of an index that are nearest to one, or to words; the nearest first.

    Args:
        index: The folder.
        wanted: A file, or the words.
        is_text: Whether it is words; the index has to be of a network that reads, which is CLIP or a text encoder.
        most: So many.

    Raises:
        UserError: there is no such index or file, or the backbone is another one now or does not read.
    """
    facts, vectors, uris = opened(index)
    network = open_network(str(facts["backbone"]))
    if network.fingerprint() != facts["fingerprint"]:
        raise UserError(f"{index}: was made by another {facts['backbone']} than there is now; make the index again")
    if is_text:
        if not isinstance(network, TextBackbone | Reader):
            raise UserError(
                f"--text: {facts['backbone']} reads no words; make the index by --backbone of a CLIP model, or of what "
                "`gtl heads --part` made"
            )
        row = network.encode_texts([wanted])
    elif isinstance(network, Reader):
        raise UserError(f"{wanted}: {facts['backbone']} reads captions, and sees no pictures; give --text")
    else:
        row = looked_at(network, Path(wanted))
    each = max(Counter(uris).values())
    cosines, places = vectors.search(units(row).numpy(), min(most * each, len(uris)))
    nearest: dict[str, float] = {}
    for cosine, at in zip(cosines[0].tolist(), places[0].tolist(), strict=True):
        if at >= 0:
            nearest.setdefault(uris[at], round(cosine, 4))
    return [Match(uri, cosine) for uri, cosine in nearest.items()][:most]


def opened(index: Path) -> tuple[dict[str, Any], Any, list[str]]:
    """What an index says of itself, its vectors, and the picture of each.

    Raises:
        UserError: there is none, or it is damaged.
    """
    faiss = library()
    if not (index / FACTS).is_file():
        raise UserError(f"{index}: no index; `gtl features index FOLDER --out {index}` makes one")
    try:
        facts, vectors = read_json(index / FACTS), faiss.read_index(str(index / VECTORS))
        uris = [json.loads(line) for line in (index / IMAGES).read_text(encoding="utf-8").splitlines()]
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{index}: damaged; make the index again") from error
    if not uris or len(uris) != vectors.ntotal or {"backbone", "fingerprint"} - facts.keys():
        raise UserError(f"{index}: damaged; make the index again")
    return facts, vectors, uris


def vectors_of(network: Backbone | Reader, whole: Sequence[Located], store: Store, progress: Progress) -> Tensor:
    """Features of pictures, or of all their captions one after the other, [N, D]."""
    if isinstance(network, Reader):
        texts = [text for located in whole for text in captions_of(located)]
        digests = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
        return features_of(network, digests, lambda at: texts[at], store, progress)[0]
    hashes = [located.record.sha256 for located in whole]
    return features_of(network, hashes, lambda at: decode(fetch(whole[at].place)), store, progress)[0]


def captions_of(located: Located) -> list[str]:
    """Its captions that say something."""
    return [text for text in located.record.captions if text.strip()]


def looked_at(extractor: Backbone, file: Path) -> Tensor:
    """A picture's features, [1, D].

    Raises:
        UserError: there is no such picture.
    """
    try:
        return extractor([decode(file.read_bytes())])[0]
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (BrokenImage, OSError) as error:
        raise UserError(f"{file}: {error}") from error


def readable(located: Located) -> bool:
    """Whether a picture can be decoded."""
    try:
        decode(fetch(located.place))
    except (BrokenImage, FileNotFoundError):
        return False
    return True


def units(rows: Tensor) -> Tensor:
    """Rows of length 1, as inner products compare them."""
    return torch.nn.functional.normalize(rows.float(), dim=1).contiguous()


def library() -> Any:
    """faiss (Douze et al. 2024, arXiv 2401.08281).

    Raises:
        UserError: it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise UserError("gtl features: needs faiss, which is not installed: pip install 'gtl[retrieval]'") from None
    return faiss
