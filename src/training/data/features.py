"""Image features of a locked tower, computed once: one Parquet file per shard, which is read like a tar shard.

    FOLDER/features.json                    the model (`FeatureInfo`), the sources and the counts
    FOLDER/000000.features.parquet, ..      columns key, record (the captions, as JSON), features (float16, views x dim)

Features take 2 x views x dim bytes per sample (1,536 for one view of ViT-B: 154 GB for 100M images). Captions are
compressed with zstd.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from training.readers.columnar import ColumnarFile
from training.readers.faults import Totals
from training.readers.samples import BrokenShardError, RawSample
from training.runtime.files import atomic_write

SUFFIX = ".features.parquet"
INDEX = "features.json"
ROWS_PER_GROUP = 1000  # rows that are read at a time


@dataclass(frozen=True)
class FeatureInfo:
    """Which model and preprocessing made the features.

    Attributes:
        model: name of the model, for messages.
        tower: fingerprint of the image tower's weights.
        preprocessing: size, mean, std and other settings of the image tower.
        views: number of augmented views of each image; 0 means one view, preprocessed as in evaluation.
        augmentation: how the views were augmented, for messages.
        precision: precision in which the tower ran.
        image_decoding: one of `images.MODES`.
        exif_rotation: whether the rotation in the images' EXIF data was applied.
    """

    model: str
    tower: str
    preprocessing: dict
    views: int
    augmentation: str
    precision: str
    image_decoding: str = "exact"
    exif_rotation: bool = False

    def differences(self, other: "FeatureInfo") -> list[str]:
        """Returns the names of the attributes because of which two sets of features can't be used together."""
        return [name for name in ("tower", "preprocessing") if getattr(self, name) != getattr(other, name)]


def is_feature_folder(path: str) -> bool:
    """Returns whether a folder holds features."""
    return os.path.isfile(os.path.join(path, INDEX))


def write_index(folder: Path, info: FeatureInfo, sources: Sequence[str], counts: dict | None) -> None:
    """Writes FOLDER/features.json; `counts` of None marks the folder as incomplete."""
    content = {"info": asdict(info), "sources": list(sources), "counts": counts}
    with atomic_write(folder / INDEX) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def read_index(folder: str | Path) -> tuple[FeatureInfo, list[str], dict | None]:
    """Returns (info, sources, counts) from FOLDER/features.json.

    Raises:
        ValueError: the file is not an index of image features.
    """
    path = Path(folder) / INDEX
    try:
        content = json.loads(path.read_text())
        return FeatureInfo(**content["info"]), content["sources"], content["counts"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not an index of image features ({error})") from error


def feature_files(folder: str) -> list[str]:
    """Returns the feature files of a folder in order.

    Raises:
        ValueError: some are missing.
    """
    _, sources, counts = read_index(folder)
    paths = [os.path.join(folder, f"{number:06d}{SUFFIX}") for number in range(len(sources))]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing or counts is None:
        raise ValueError(
            f"{folder}: {len(missing):,} of {len(paths):,} feature files are missing; run the same "
            "--extract-image-features again: it continues where it stopped"
        )
    return paths


def feature_info(spec: str) -> FeatureInfo | None:
    """Returns the model of the features that ``--train-data`` names; None if it names images.

    Raises:
        ValueError: some sources hold features and others images, or the features are from different towers.
    """
    names = spec.split("::")
    infos = [read_index(name)[0] for name in names if is_feature_folder(name)]
    if not infos:
        return None
    if len(infos) != len(names):
        raise ValueError(f"{spec}: some sources are image features, others are images; extract all of them, or none")
    for name, info in zip(names, infos):
        if different := infos[0].differences(info):
            raise ValueError(f"{name}: its image tower is not the one of {names[0]} ({', '.join(different)} differ)")
    return infos[0]


def write_features(
    path: Path, source: str, keys: Sequence[str], records: Sequence[dict], features: np.ndarray, totals: Totals
) -> None:
    """Writes the features of a shard's samples; an interrupted call leaves no partial file.

    Args:
        path: ``NUMBER.features.parquet``.
        source: name of the shard; together with the key it seeds the random stream of a sample.
        keys, records: one per sample.
        features: [samples, views, dim] float16.
        totals: counts of samples read and skipped.
    """
    count, views, dim = features.shape
    flat = pa.array(np.ascontiguousarray(features).reshape(-1))
    table = pa.table(
        {
            "key": pa.array(keys, pa.string()),
            "record": pa.array([json.dumps(r, ensure_ascii=False) for r in records], pa.large_string()),
            "features": pa.FixedSizeListArray.from_arrays(flat, views * dim),
        }
    ).replace_schema_metadata(
        {"source": source, "views": str(views), "dim": str(dim), "totals": json.dumps(totals.to_dict())}
    )
    compression = {"key": "zstd", "record": "zstd", "features.list.element": "none"}
    with atomic_write(path) as temporary:
        pq.write_table(table, temporary, row_group_size=ROWS_PER_GROUP, compression=compression, use_dictionary=False)


def read_totals(paths: Sequence[str]) -> Totals:
    """Adds up the counts of samples read and skipped of several feature files."""
    totals = Totals()
    for path in paths:
        totals.add(Totals.from_dict(json.loads(pq.read_metadata(path).metadata[b"totals"])))
    return totals


def read_features(path: str, first: int = 0, stop: int | None = None) -> Iterator[RawSample]:
    """Reads samples of a feature file; for arguments and errors see `tar.read_samples`."""
    try:
        file = ColumnarFile(path)
        meta = {key.decode(): value.decode() for key, value in file.schema.metadata.items()}
        shape = -1, int(meta["views"]), int(meta["dim"])
        for batch in file.batches(("key", "record", "features"), first, stop):
            keys, records = batch.column("key").to_pylist(), batch.column("record").to_pylist()
            features = batch.column("features").flatten().to_numpy().reshape(shape)
            for key, record, views in zip(keys, records, features):
                yield RawSample(key, meta["source"], {}, json.loads(record), features=views)
    except (OSError, KeyError, ValueError, AttributeError) as error:
        raise BrokenShardError(f"{path}: {type(error).__name__}: {str(error)[:200]}") from error
