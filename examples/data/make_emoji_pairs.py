"""Make `emoji_pairs.parquet`: every emoji that both Noto and Twemoji draw, with its English label and tags.

    npm install emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 emojibase-data@17.0.0
    python examples/data/make_emoji_pairs.py node_modules

One row a drawing. Drawings are composited on white and stored as lossless WebP: as PNG they would not fit in 8 MB.
The slowest setting of WebP is used, so this takes five minutes.
"""

import argparse
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, List, Value
from PIL import Image as PILImage
from tqdm import tqdm

# style -> (npm package, folder of its drawings, licence of the drawings)
STYLES = {
    "noto": ("emoji-datasource-google", "img/google/64", "Apache-2.0"),
    "twemoji": ("emoji-datasource-twitter", "img/twitter/64", "CC-BY-4.0"),
}
FEATURES = Features(
    {
        "concept": Value("string"),
        "image": Image(),
        "label": Value("string"),
        "tags": List(Value("string")),
        "style": Value("string"),
        "group": Value("string"),
        "license": Value("string"),
    }
)


def read_names(node_modules: Path) -> dict[str, dict]:
    """emojibase's entries by code points, without the variation selector (FE0F) that the packages disagree on."""
    entries = json.loads((node_modules / "emojibase-data/en/data.json").read_text(encoding="utf-8"))
    return {entry["hexcode"].replace("-FE0F", ""): entry for entry in entries}


def encode_image(path: Path) -> bytes:
    """A 64 x 64 drawing on white as lossless WebP."""
    drawing = PILImage.open(path).convert("RGBA")
    if drawing.size != (64, 64):
        raise ValueError(f"{path} is {drawing.size[0]} x {drawing.size[1]} pixels, expected 64 x 64.")
    canvas = PILImage.new("RGBA", drawing.size, "white")
    canvas.alpha_composite(drawing)
    buffer = io.BytesIO()
    canvas.convert("RGB").save(buffer, "WEBP", lossless=True, quality=100, method=6)
    return buffer.getvalue()


def read_rows(node_modules: Path) -> list[dict]:
    """Two rows a concept, in Unicode's order."""
    names = read_names(node_modules)
    concepts = json.loads((node_modules / "emoji-datasource-google/emoji.json").read_text(encoding="utf-8"))
    rows = []
    for concept in tqdm(sorted(concepts, key=lambda concept: concept["sort_order"]), desc="concepts"):
        if not (concept["has_img_google"] and concept["has_img_twitter"]):
            continue
        named = names[concept["unified"].replace("-FE0F", "")]
        for style, (package, folder, license_id) in STYLES.items():
            image = encode_image(node_modules / package / folder / concept["image"])
            rows.append(
                {
                    "concept": concept["unified"],
                    "image": {"bytes": image, "path": f"{style}-{Path(concept['image']).stem}.webp"},
                    "label": named["label"],
                    "tags": named["tags"],
                    "style": style,
                    "group": concept["category"],
                    "license": license_id,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("node_modules", type=Path, help="the folder that npm install made")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("emoji_pairs.parquet"))
    args = parser.parse_args()
    rows = read_rows(args.node_modules)
    table = pa.Table.from_pylist(rows, schema=FEATURES.arrow_schema)
    pq.write_table(table, args.out, compression="zstd", compression_level=19, row_group_size=500)
    print(f"{args.out}: {len(rows)} drawings, {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
