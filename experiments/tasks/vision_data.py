"""What is known of a published data set before it lies on disk: the type of the catalogue's entries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from theory.errors import MergeboundError


@dataclass(frozen=True)
class Archive:
    """One file to download.

    Attributes:
        url: the address that the data set's source gives.
        into: folder below the root, with ``/`` (empty: the root itself), that receives what the archive holds, or the
            file itself where it is no archive.
        unpack: ``.zip``, ``.tar``, ``.tar.gz`` and ``.tgz`` are unpacked into ``into``; a ``.gz`` of one file is
            decompressed beside itself; ``False`` keeps the file as it is.
        md5, sha256: as published, in hexadecimal; None where none is.
        size: bytes; None where unknown.
        mirrors: other addresses of the same bytes.
        name: name of the file on disk; empty: the last part of the address.
    """

    url: str
    into: str = ""
    unpack: bool = True
    md5: str | None = None
    sha256: str | None = None
    size: int | None = None
    mirrors: tuple[str, ...] = ()
    name: str = ""

    @property
    def filename(self) -> str:
        """Name of the downloaded file."""
        return self.name or urlsplit(self.url).path.rpartition("/")[2]


@dataclass(frozen=True)
class VisionData:
    """One image-classification data set, as its source publishes it.

    Attributes:
        name: what the toolkit calls it (``stanford_cars``).
        title: what people call it (``Stanford Cars``).
        classes: how many.
        class_names: in the order of the labels, where the source fixes them; empty where they are read from disk.
        class_names_from: where the names come from, in words.
        counts: images per official part (``train``, ``validation``, ``test``); a data set without its own split has
            only ``train``.
        other_counts: counts of other official forms, such as without the files that make the usual split.
        files: what must lie below the root, relative, with ``/``: files, or folders (ending in ``/``); alternatives
            are separated by ``|``, the usual one first, and each file may have ``.gz`` appended.
        archives: what to download; empty where nothing may be downloaded automatically.
        manual: what to do by hand where ``archives`` is empty.
        licence: as the source states it, ``not stated`` where it states none.
        citation: the paper to cite.
        homepage: address of the source's page.
        form: size and colour of the images, in words.
        spoken: class names as zero-shot prompts say them, where they differ from ``class_names``; else empty.
        aliases: other usual spellings of the name.
        note: what users should know (split, quirks), one sentence or two.
    """

    name: str
    title: str
    classes: int
    class_names_from: str
    counts: Mapping[str, int]
    files: tuple[str, ...]
    citation: str
    homepage: str
    form: str
    class_names: tuple[str, ...] = ()
    other_counts: tuple[Mapping[str, int], ...] = ()
    archives: tuple[Archive, ...] = ()
    manual: str = ""
    licence: str = "not stated"
    spoken: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        for names in (self.class_names, self.spoken):
            if names and (len(names) != self.classes or len(set(names)) != self.classes):
                raise MergeboundError(f"{self.name}: {len(set(names))} class names for {self.classes} classes")
        if bool(self.archives) == bool(self.manual):
            raise MergeboundError(f"{self.name}: give archives to download or manual instructions, not both")

    @property
    def size(self) -> int | None:
        """Bytes to download, None where that of an archive is unknown or nothing can be downloaded.

        Single files of unknown size (lists of names) are not counted.
        """
        if not self.archives or any(archive.size is None for archive in self.archives if archive.unpack):
            return None
        return sum(archive.size or 0 for archive in self.archives)

    def missing(self, root: Path) -> tuple[str, ...]:
        """What of ``files`` is not below the root (the first alternative of each); empty where all is there."""
        return tuple(each.split("|")[0] for each in self.files if not any(_is_there(root, n) for n in each.split("|")))

    def advice(self, root: object = "DIR") -> str:
        """How to get the data: the command, or what to do by hand."""
        return self.manual or f"mergebound data get {self.name} --root {root}"


def _is_there(root: Path, name: str) -> bool:
    path = root / name
    return path.is_dir() if name.endswith("/") else path.is_file() or path.with_name(f"{path.name}.gz").is_file()
