"""Embeddings of texts, each text encoded once: Arrow files under the encoder's key, rows found by the text's hash.

A file appears whole or not at all, so that what was encoded before a kill is there afterwards; several processes write
into one folder, each its share. What lies there can be deleted at any time.
"""

import hashlib
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from ddpo import distributed, log
from ddpo.encoders import Encoder
from ddpo.files import cache_folder, new_file

FILE_TEXTS, FILE_SECONDS = 4096, 60  # a file is written when as many texts are encoded, or as much time has passed
BATCH_TEXTS = 128  # encoded between two moves of the progress bar
PAUSES = (0, 1, 2, 4)  # seconds; a network disk shows another machine's files late


def default_folder() -> Path:
    return cache_folder() / "embeddings"


def hash_of(text: str) -> bytes:
    """16 bytes."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class Embedded:
    """The embeddings of one encoder."""

    def __init__(self, encoder: Encoder, folder: str | Path | None = None):
        """folder: of all encoders' embeddings; None: the user's cache."""
        self.encoder = encoder
        self.folder = Path(folder or default_folder()) / encoder.key
        self._files: dict[str, np.ndarray] = {}  # name -> (m, D), memory-mapped
        self._hashes = np.empty(0, "S16")  # of all texts that are there, sorted
        self._places = np.empty((0, 2), np.int32)  # their file and row
        self._open()

    def rows(self, texts: Sequence[str], note: str = "") -> torch.Tensor:
        """(n, D) float32 of n >= 1 texts, in their order; those that are not there yet are encoded first, under
        torchrun by all processes together. note: which of many calls it is; stands beside the bar, which then goes.

        Raises: ValueError for no text and for an embedding that is not finite, RuntimeError where processes do not
        share the folder.
        """
        if not len(texts):
            raise ValueError(f"{self.encoder.label}: there is no text to encode")
        hashes = list(map(hash_of, texts))
        self._encode(dict(zip(hashes, texts, strict=True)), note)
        return self.find(hashes)

    def find(self, hashes: Sequence[bytes]) -> torch.Tensor:
        """(n, D) float32 of texts that are there, by hash_of."""
        files = list(self._files.values())
        places = self._places[np.searchsorted(self._hashes, np.array(hashes, "S16"))]  # (n, 2)
        out = np.empty((len(hashes), files[places[0, 0]].shape[1]), np.float32)
        for file in np.unique(places[:, 0]):
            here = places[:, 0] == file
            out[here] = files[file][places[here, 1]]
        return torch.from_numpy(out)

    def _lacks(self, hashes: Collection[bytes]) -> list[bytes]:
        wanted = np.array(list(hashes), "S16")
        at = np.searchsorted(self._hashes, wanted).clip(max=max(0, len(self._hashes) - 1))
        there = self._hashes[at] == wanted if len(self._hashes) else np.zeros(len(wanted), bool)
        return [h for h, known in zip(hashes, there, strict=True) if not known]

    def _encode(self, texts: dict[bytes, str], note: str = "") -> None:
        """Encodes those that are missing, shortest first."""
        rank, world = distributed.start()
        missing = distributed.from_first(self._lacks(texts))
        mine = [(h, texts[h]) for h in sorted(missing, key=lambda h: len(texts[h]))[rank::world]]
        with log.progress(transient=bool(note)) as bar:
            task = bar.add_task(self.encoder.label, total=len(mine), note=note, visible=bool(mine))
            made, since = [], time.monotonic()
            for start in range(0, len(mine), BATCH_TEXTS):
                batch = mine[start : start + BATCH_TEXTS]
                made.append((batch, self._finite(batch)))
                bar.advance(task, len(batch))
                done, is_last = sum(len(b) for b, _ in made), start + BATCH_TEXTS >= len(mine)
                if done >= FILE_TEXTS or time.monotonic() - since > FILE_SECONDS or is_last:
                    self._write([h for b, _ in made for h, _ in b], torch.cat([rows for _, rows in made]).numpy())
                    made, since = [], time.monotonic()
        if missing:
            distributed.barrier()
        for pause in PAUSES:
            if not self._lacks(texts):
                return
            time.sleep(pause)
            self._open()
        if self._lacks(texts):
            raise RuntimeError(
                f"{self.folder}: embeddings that another process made are not there; give --embeddings a folder that "
                "all machines share"
            )

    def _finite(self, batch: list[tuple[bytes, str]]) -> torch.Tensor:
        rows = self.encoder.encode([text for _, text in batch])
        for (_, text), row in zip(batch, rows, strict=True):
            if not torch.isfinite(row).all():
                raise ValueError(f"{self.encoder.label}: the embedding of {text[:60]!r} is not finite")
        return rows

    def _write(self, hashes: list[bytes], rows: np.ndarray) -> None:
        values = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel(), pa.float32()), rows.shape[1])
        table = pa.table({"hash": pa.array(hashes, pa.binary(16)), "embedding": values})
        name = hashlib.sha256(b"".join(hashes)).hexdigest()[:16]
        with (
            new_file(self.folder / f"{name}.arrow") as draft,
            pa.OSFile(str(draft), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as writer,
        ):
            writer.write_table(table, max_chunksize=len(hashes))

    def _open(self) -> None:
        """Takes up the files that are new."""
        hashes, places = [self._hashes], [self._places]
        for path in sorted(self.folder.glob("[!.]*.arrow")):
            if path.name in self._files:
                continue
            try:
                batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
                found, rows = batch["hash"].to_pylist(), batch["embedding"]
            except (pa.ArrowInvalid, KeyError) as err:
                raise ValueError(f"{path} is damaged ({err}); delete it, its texts are encoded again") from None
            rows = rows.flatten().to_numpy().reshape(len(found), rows.type.list_size)
            places.append(np.stack([np.full(len(found), len(self._files)), np.arange(len(found))], 1).astype(np.int32))
            hashes.append(np.array(found, "S16"))
            self._files[path.name] = rows
        if len(hashes) > 1:
            joined = np.concatenate(hashes)
            order = np.argsort(joined, kind="stable")
            self._hashes, self._places = joined[order], np.concatenate(places)[order]
