"""Draws figures/*.png from the recorded results in figures/*.json; `make figures` runs it.

    python scripts/figures.py                                       draw
    python scripts/figures.py --record logs/NAME --as "our B/16"    record an evaluation first
    python scripts/figures.py --record-demo logs/demo               record a demo first

    ours.json        our evaluations on the published benchmarks
    demo.json        the demo's comparison
    lengths.json     R@1 by number of tokens, for evaluations and the demo
    recipes.json     losses of scripts/run_recipes.py
    statistics.json  counts of `python -m dataloaders.prepare stats`

Published numbers are in src/training/eval/published.json; `--table` prints them as the README's table.

Figures without recorded results are not drawn. Evaluations are recorded only on complete benchmarks.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from dataloaders.prepare import CONTEXTS, CaptionStats

FIGURES = Path(__file__).parents[1] / "figures"
PUBLISHED = FIGURES.parent / "src" / "training" / "eval" / "published.json"
DEMO_RUNS = {"lotlip": "short and long captions", "short_only": "short captions only"}
DEMO_LAYOUT = "Urban1k"  # the demo's scenes have the layout of this benchmark, but are not its images
# title -> key of results; protocol and number of pairs of published numbers
KEYS = {
    "DCI": ("dci-retrieval", "dci/short+extra", None),
    "IIW": ("iiw-retrieval", "iiw/612", None),
    "SV-10k": ("share4v-retrieval-10000", "sv/sam", 10000),
    "Urban1k": ("urban1k-retrieval", "urban1k/first-line", None),
    "DOCCI": ("docci-retrieval", "docci/test", None),
    "Long-DCI": ("long-dci-retrieval", "long-dci", None),
}
SIZE = "B/16"


def read(name: str) -> dict | list | None:
    """Returns the content of figures/NAME.json; None if there is no such file."""
    path = FIGURES / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write(name: str, content: dict | list, indent: int | None = 1) -> None:
    """Writes figures/NAME.json."""
    (FIGURES / f"{name}.json").write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")


def caption_stats_of(content: list[dict]) -> list[CaptionStats]:
    """Returns the statistics whose counts `prepare stats` wrote, with captions in another order."""

    def values(counts: dict[str, int]) -> np.ndarray:
        return np.repeat(np.array([int(value) for value in counts]), list(counts.values()))

    return [
        CaptionStats(one["title"], one["images"], values(one["sentences"]), values(one["tokens"])) for one in content
    ]


def last_result(run: Path) -> dict:
    """Returns the last line of a run's results.jsonl; FileNotFoundError if there is none."""
    path = run / "checkpoints" / "results.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; name the folder of an evaluation, LOGS/NAME")
    return json.loads(path.read_text(encoding="utf-8").splitlines()[-1])


def record(run: Path, label: str) -> None:
    """Adds an evaluation's R@1 on complete benchmarks to ours.json, and its length curves to lengths.json."""
    result, ours = last_result(run), read("ours") or {"models": {}}
    recall = {}
    for title, (key, *_) in KEYS.items():
        if f"{key}-i2t-top1" in result and result[f"{key}-num-pairs"] == result[f"{key}-num-expected"]:
            recall[title] = [round(100 * result[f"{key}-{d}-top1"], 2) for d in ("i2t", "t2i")]
    facts = {name: result.get(name) for name in ("model", "pretrained", "weights_sha256", "date", "device")}
    if recall:
        ours["models"][label] = {"recall": recall, **facts}
        write("ours", ours)
    if "lengths" in result:
        _record_lengths(label, result["lengths"], facts)
    if not recall and "lengths" not in result:
        raise ValueError(f"{run}: its result has neither a complete {', '.join(KEYS)} nor --retrieval-lengths")


def record_demo(folder: Path) -> None:
    """Writes a demo's summary to demo.json, and adds its length curves to lengths.json."""
    path = folder / "summary.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; run make demo first")
    summary = json.loads(path.read_text(encoding="utf-8"))
    write("demo", {"source": "make demo; fractions", **summary})
    for name, label in DEMO_RUNS.items():
        result = last_result(folder / name)
        if "lengths" in result:
            found = {
                name: {"scenes" if title == DEMO_LAYOUT else title: v for title, v in part.items()}
                for name, part in result["lengths"].items()
                if isinstance(part, dict)
            }
            _record_lengths(f"demo, {label}", {**result["lengths"], **found}, {"date": result["date"]})


def _record_lengths(label: str, found: dict, facts: dict) -> None:
    lengths = read("lengths") or {"runs": {}}
    lengths["runs"][label] = {**found, **facts}
    write("lengths", lengths)


def published() -> dict[str, tuple[dict, dict[str, list[float]]]]:
    """Returns the published numbers: model -> (its description, benchmark -> R@1 [I2T, T2I]).

    If several papers print a number, the first in the file is used.
    """
    content = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    found = {name: (about, {}) for name, about in content["models"].items()}
    for title, (_, protocol, pairs) in KEYS.items():
        for row in content["numbers"]:
            if row["protocol"] == protocol and row.get("pairs") == pairs:
                found[row["model"]][1].setdefault(title, [row["i2t"], row["t2i"]])
    return found


def published_table() -> str:
    """Returns the README's table of published numbers of base-size models, I2T / T2I, oldest first."""
    base = ((name, own) for name, own in published().items() if own[0]["size"].startswith("B/"))
    models = sorted(base, key=lambda item: item[1][0]["year"])
    lines = [["model", "year", "data", *KEYS], ["---"] * (3 + len(KEYS))]
    for name, (about, recall) in models:
        cells = [" / ".join(f"{value:.1f}" for value in recall[t]) if t in recall else "-" for t in KEYS]
        if recall:
            lines.append([name, str(about["year"]), about["data"], *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw_published() -> object:
    """Draws the published numbers of models of one size together with our evaluations, the best on top."""
    from matplotlib import pyplot

    ours = read("ours") or {"models": {}}
    bars = {
        f"{name.replace('ViT-', '')} ({about['year']}, {about['data']})": recall
        for name, (about, recall) in published().items()
        if about["size"] == SIZE
    }
    bars |= {f"{name}, measured by this project": own["recall"] for name, own in ours["models"].items()}
    figure, panels = pyplot.subplots(3, 2, figsize=(11, 9.5), layout="constrained")
    for axes, title in zip(panels.flat, KEYS):
        here = sorted(((sum(r[title]) / 2, name, r[title]) for name, r in bars.items() if title in r), reverse=True)
        for place, (_, name, (i2t, t2i)) in enumerate(here):
            color = "C3" if name.endswith("project") else "C0"
            axes.plot([i2t, t2i], [place, place], color="0.8", linewidth=3, zorder=1)
            axes.scatter(i2t, place, color=color, marker="o", zorder=2)
            axes.scatter(t2i, place, edgecolor=color, facecolor="white", marker="o", zorder=3)
        axes.set_yticks(range(len(here)), [name for _, name, _ in here], fontsize=8)
        axes.set(title=title, xlabel="R@1 in percent", ylim=(len(here) - 0.4, -0.6))
        axes.grid(axis="x", alpha=0.3)
    for face, label in (("C0", "image to text"), ("white", "text to image")):
        panels[0][0].scatter([], [], edgecolor="C0", facecolor=face, label=label)
    panels[0][0].legend(fontsize=8)
    note = "as printed" if not ours["models"] else "as printed; red: measured by this project"
    figure.suptitle(f"Long text-image retrieval, ViT-{SIZE} (year, pairs of pre-training + long captions), {note}")
    return figure


def draw_demo() -> object:
    """Draws the demo's comparison as bars."""
    from matplotlib import pyplot

    demo = read("demo")
    names = {"long_i2t_top1": "long captions,\nI2T R@1", "long_t2i_top1": "long captions,\nT2I R@1"}
    names["short_top1"] = "48 short prompts,\ntop-1"
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for n, (run, label) in enumerate(DEMO_RUNS.items()):
        places = [p + 0.4 * n for p in range(len(names))]
        axes.bar_label(
            axes.bar(places, [100 * demo[run][k] for k in names], 0.38, label=f"trained on {label}"), fmt="%.1f"
        )
    axes.set_xticks([p + 0.2 for p in range(len(names))], names.values())
    axes.set(ylabel="percent", ylim=(0, 105), title="Demo: 1,000 unseen scenes")
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    return figure


def draw_lengths() -> object:
    """Draws R@1 by number of tokens for all recorded runs; returns None if there are none."""
    from matplotlib import pyplot

    lengths = read("lengths")
    if not lengths:
        return None
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for label, run in lengths["runs"].items():
        for title, found in run["sets"].items():
            curve = {int(n): 50 * (own["i2t"] + own["t2i"]) for n, own in found.get("tokens", {}).items()}
            effective = run["effective_length"][title]
            name = f"{label}, {title}" + ("" if effective is None else f" (effective length {effective:.0f})")
            axes.plot(curve.keys(), curve.values(), marker="o", label=name)
    axes.set(xlabel="tokens of each caption that are read", ylabel="R@1 in percent, mean of both directions")
    axes.set(title="How much of a caption a model makes use of", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def draw_recipes() -> object:
    """Draws the losses of the recipes on scenes, one panel each; returns None if none are recorded."""
    from matplotlib import pyplot

    content = read("recipes")
    if not content:
        return None
    recipes = content["recipes"]
    columns = 3
    figure, panels = pyplot.subplots(-(-len(recipes) // columns), columns, figsize=(11, 7.5), layout="constrained")
    for axes, (name, run) in zip(panels.flat, recipes.items()):
        terms = {term: values for term, values in run["losses"].items() if term != "loss"}
        for term, values in terms.items():
            axes.plot(run["steps"], values, label=term.removesuffix("_loss"))
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
        if max(map(max, terms.values())) > 15:
            axes.set_yscale("log")
    for axes in panels.flat[len(recipes) :]:
        axes.set_visible(False)
    figure.supxlabel("steps of 32 scenes", fontsize=9)
    figure.suptitle("Loss terms of the recipes on drawn scenes, small models (each in its own scale)", fontsize=11)
    return figure


def draw_stats(found: list[CaptionStats]) -> object:
    """Draws images, sentences and tokens per caption (box: quartiles, whiskers: 5 to 95%), and captions cut.

    Returns:
        The matplotlib figure.
    """
    from matplotlib import pyplot

    names = [s.title.replace("$", r"\$") for s in found]
    figure, panels = pyplot.subplots(1, 4, figsize=(14, 1.8 + 0.45 * len(found)), layout="constrained", sharey=True)
    places = range(len(found))
    bars = panels[0].barh(places, [s.num_images for s in found], color="C0")
    panels[0].bar_label(bars, [f"{s.num_images:,}" for s in found], padding=3, fontsize=8)
    limits = (1, 10 * max(s.num_images for s in found))
    panels[0].set(xscale="log", xlim=limits, xlabel="images", yticks=places, yticklabels=names)
    for axes, kind in zip(panels[1:3], ("sentences", "tokens")):
        values = [getattr(s, kind) for s in found]
        axes.boxplot(values, positions=places, orientation="horizontal", whis=(5, 95), showfliers=False, widths=0.6)
        axes.scatter([v.mean() for v in values], places, marker="D", s=18, color="C1", zorder=3, label="mean")
        axes.set(xlabel=f"{kind} per caption", xlim=(0, None), yticks=places, yticklabels=names)
        axes.legend(fontsize=8)
    for context in CONTEXTS:
        panels[2].axvline(context, color="0.6", linestyle=":", linewidth=1)
    for n, context in enumerate(CONTEXTS):
        heights = [place + 0.27 * (n - 1) for place in places]
        shares = [100 * s.share_over(context) for s in found]
        panels[3].barh(heights, shares, 0.25, color=f"C{n}", label=f"over {context} tokens")
    panels[3].set(xlabel="captions cut, percent", xlim=(0, 100))
    panels[3].legend(fontsize=8)
    panels[0].invert_yaxis()
    return figure


def draw_statistics() -> object:
    """Draws the caption lengths of benchmarks; returns None if no counts are recorded."""
    recorded = read("statistics")
    return draw_stats(caption_stats_of(recorded)) if recorded else None


def main() -> int:
    """Records the given results and draws all figures; returns 0, or exits with 2 on a usage error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, metavar="RUN", help="folder of an evaluation to record")
    parser.add_argument("--as", dest="label", metavar="LABEL", help="its name in figures (default: the folder's name)")
    parser.add_argument("--record-demo", type=Path, metavar="DIR", help="folder of a demo to record")
    parser.add_argument("--record-stats", type=Path, metavar="JSON", help="counts of `prepare stats` to record")
    parser.add_argument("--table", action="store_true", help="print the README's table of published numbers and stop")
    args = parser.parse_args()
    if args.table:
        print(published_table())
        return 0
    try:
        if args.record:
            record(args.record, args.label or args.record.name)
        if args.record_demo:
            record_demo(args.record_demo)
        if args.record_stats:
            new = json.loads(args.record_stats.read_text(encoding="utf-8"))
            kept = [own for own in read("statistics") or [] if own["title"] not in {other["title"] for other in new}]
            write("statistics", kept + new, indent=None)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    import matplotlib

    matplotlib.use("Agg")
    for name, draw in (
        ("published", draw_published),
        ("demo", draw_demo),
        ("lengths", draw_lengths),
        ("recipes", draw_recipes),
        ("statistics", draw_statistics),
    ):
        figure = draw()
        if figure is None:
            print(f"figures/{name}.png: nothing recorded yet")
        else:
            figure.savefig(FIGURES / f"{name}.png", dpi=110, metadata={"Software": None})
            print(f"figures/{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
