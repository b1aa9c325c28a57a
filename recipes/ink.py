"""Make the folder of the model "ink": a model of all 30 alphabets, with a threshold and figures from a sister of 25.

Data: Omniglot's images_background, ALPHABET/CHARACTER/IMAGE (Lake, Salakhutdinov and Tenenbaum 2015, Science 350,
https://github.com/brendenlake/omniglot, MIT licence): 30 alphabets, 964 characters, 20 drawings of each.

    python recipes/ink.py --data images_background --model runs/all --sister runs/sister --command "..."

Whoever uses "ink" shall have a model that has learned from all alphabets, and then none is left to choose a threshold
on. So `--sister`, trained by the same command without the alphabets of `--held-out`, is judged on those; its verifier
is bound to `--model` by `vitembed.verify.transfer`, and its protocol says whose scores they were. The recipe refuses a
sister that has seen a held-out alphabet and another network, and tells settings that differ. The figures of the sister
are for unseen alphabets (validation figures where the settings were chosen on the same ones); those of the model itself
are of drawings it was trained on: they only show whether an installation computes what this one did.

Writes config.json, model.safetensors, README.md (the model card), figures.json and ink.verifier, in 12 seconds on two
cores.
"""

import argparse
import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitembed import metrics
from vitembed.embedder import Embedder
from vitembed.errors import ConfigError, DataError, VitembedError
from vitembed.files import atomic_write
from vitembed.training import ImageDataset
from vitembed.verify import Calibration, fit_labelled, transfer
from vitembed.weights.shipped import FIGURES

NAME = "ink"
HOME = Path(__file__).resolve().parents[1] / "vitembed" / "models" / NAME
VALIDATION = ("Ojibwe_(Canadian_Aboriginal_Syllabics)", "Sanskrit", "Syriac_(Estrangelo)", "Tagalog", "Tifinagh")
SUBSET = {"characters": 3, "drawings": 4}  # of each alphabet the first characters by name, of each the first drawings
TOLERANCE = 0.01  # of figures on the subset, for another machine's arithmetic

CARD = """\
## Data

Omniglot's background set: {alphabets} alphabets, {characters} characters, each drawn online by {drawings} people (Lake,
Salakhutdinov and Tenenbaum 2015, "Human-level concept learning through probabilistic program induction", Science 350,
https://github.com/brendenlake/omniglot, MIT licence). No signatures, no photographs.

Command: `{command}`

## Figures

| figure | value | measured on |
|---|---|---|
{rows}

The figures of the sister model are for alphabets that it had not seen; those of this model are of drawings that it was
trained on and tell nothing of others. `figures.json` has the protocols.

## Threshold

{threshold}

## Licence and limits

{limits}
"""

LIMITS = (
    "The weights are under the MIT licence, as vitembed is. The model is for single handwritten characters on a "
    "{ground}. Nothing is known of signatures, words or photographs: train a model for these, or calibrate this one on "
    "them with `vitembed calibrate`. The rates of the threshold were not measured with these very weights."
)


def main() -> None:
    """Check the two models, measure, write the folder, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Omniglot's images_background")
    parser.add_argument("--model", type=Path, required=True, help="trained on all alphabets; its folder")
    parser.add_argument("--sister", type=Path, required=True, help="trained without the held-out ones; its folder")
    parser.add_argument("--command", required=True, help="that trained the model, for the card")
    parser.add_argument("--held-out", nargs="+", default=VALIDATION, metavar="ALPHABET")
    parser.add_argument("--figures", type=Path, help="a JSON list of figures measured elsewhere, to be kept along")
    parser.add_argument("--far", type=float, default=0.01, help="the false-accept rate of the threshold")
    parser.add_argument("--drawings", type=int, default=20, help="of a held-out character; fewer are quicker")
    parser.add_argument("--out", type=Path, default=HOME, help="the package's own folder by default")
    args = parser.parse_args()

    data = ImageDataset.load(args.data)
    model, sister = Embedder.from_pretrained(args.model), Embedder.from_pretrained(args.sister)
    check(model, sister, data, args.held_out)
    judged = first_of(data, args.held_out, drawings=args.drawings)
    found, _ = fit_labelled(sister, judged.images, judged.labels, far=args.far, count=0, location=str(args.sister))
    tuned = ", on which the settings were chosen, too" if set(args.held_out) & set(VALIDATION) else ""
    reason = f"a sister trained by the same command without the alphabets {', '.join(args.held_out)}{tuned}"
    bound = transfer(found, model, reason, location=NAME)

    where = f"{len(args.held_out)} alphabets that the sister model had not seen{tuned}, {len(judged)} drawings"
    about = {"of": "sister", "model": sister.fingerprint, "held out": list(args.held_out), "protocol": where}
    figures = [{**about, **one} for one in [*retrieval(sister, judged), *rates(found.calibration)]]
    seen = "a check on what it was trained on: the first {drawings} drawings of {characters} characters an alphabet"
    about = {
        "of": "model",
        "model": model.fingerprint,
        "protocol": seen.format(**SUBSET),
        "subset": SUBSET,
        "tolerance": TOLERANCE,
    }
    few = first_of(data, alphabets_of(data.classes), **SUBSET)
    figures += [{**about, **one} for one in retrieval(model, few)]
    if args.figures is not None:
        figures += json.loads(args.figures.read_text(encoding="utf-8"))

    seen = sorted({re.sub(r"@\d+", "", name) for name in model.provenance["trained classes"]})  # turned ones go unsaid:
    model.provenance |= {"trained classes": seen}  # four names a character would be a twentieth of the model
    model.save_pretrained(args.out)
    bound.save(args.out / f"{NAME}.verifier")
    atomic_write(args.out / FIGURES, json.dumps({"model": model.fingerprint, "figures": figures}, indent=1) + "\n")
    write_card(args.out / "README.md", model, data, figures, bound.calibration, args.command)
    for one in figures:
        print(f"{one['value']:.4f}  {one['name']}, {one['of']}: {one['protocol']}")


def alphabets_of(classes: Any) -> list[str]:
    """Return the alphabets of names such as Greek/character01, Greek/character01@90 and Greek@90/character01."""
    return sorted({name.split("/")[0].split("@")[0] for name in classes})


def check(model: Embedder, sister: Embedder, data: ImageDataset, held_out: list[str]) -> None:
    """Refuse models that are no sisters, or that have seen what they must not; print settings that differ."""
    if unknown := set(held_out) - set(alphabets_of(data.classes)):
        raise DataError(f"the data has no alphabet {min(unknown)}; it has {', '.join(alphabets_of(data.classes))}")
    of_model, of_sister = model.provenance, sister.provenance
    seen = alphabets_of([*of_sister.get("trained classes", ()), *of_sister.get("pre-trained on", ())])
    if not seen:
        raise ConfigError("the sister does not record what it was trained on; train it with vitembed")
    if known := set(held_out) & set(seen):
        raise ConfigError(f"the sister was trained on {', '.join(sorted(known))}; hold out what it has not seen")
    if missing := set(alphabets_of(data.classes)) - set(alphabets_of(of_model.get("trained classes", ()))):
        raise ConfigError(f"the model was not trained on {', '.join(sorted(missing))}; it must have seen all alphabets")
    if model.network.vit.config != sister.network.vit.config or model.preprocess != sister.preprocess:
        raise ConfigError("model and sister are different networks, or read images differently; train both alike")
    ours, theirs = ({**each.get("settings", {}), "loss": loss_of(each)} for each in (of_model, of_sister))
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            print(f"differs: {name} is {ours.get(name)} for the model and {theirs.get(name)} for the sister")


def loss_of(provenance: dict[str, Any]) -> str:
    """Return the loss that is recorded, without the fingerprints of teachers: those of a sister are others."""
    return re.sub("sha256:[0-9a-f]+", "...", str(provenance.get("loss")))


def first_of(data: ImageDataset, alphabets: Any, drawings: int, characters: int = 10**9) -> ImageDataset:
    """Return the first drawings of the first characters of some alphabets, both in the order of their names."""
    wanted = [
        name
        for alphabet in alphabets
        for name in sorted(name for name in data.classes if name.split("/")[0] == alphabet)[:characters]
    ]
    of_classes = data.labels[:, None] == np.array([data.classes.index(name) for name in wanted])  # (N, classes)
    rows: list[NDArray[np.int64]] = [np.flatnonzero(column)[:drawings] for column in of_classes.T]
    return data.subset(np.concatenate(rows))


def retrieval(model: Embedder, images: ImageDataset) -> list[dict[str, Any]]:
    """Return recall@1 and the equal error rate over all pairs of the images."""
    vectors = model.encode(images.images, batch_size=256, workers=0)
    recall = metrics.query_ranks(vectors, images.labels).first_rank == 1
    eer = metrics.equal_error_rate(*metrics.pair_scores(vectors, images.labels))[0]
    values = {"recall@1": float(recall.mean()), "equal error rate": float(eer)}
    return [{"name": name, "value": value, "seed": None} for name, value in values.items()]


def rates(known: Calibration) -> list[dict[str, Any]]:
    """Return the rates at the threshold, a posteriori, with the intervals for as many other characters."""
    about = {"seed": 0, "pairs": f"{known.matches} matching and {known.non_matches} other pairs, drawn"}
    return [
        {"name": "false-accept rate at the threshold", "value": known.far, "interval": known.far_interval, **about},
        {"name": "false-reject rate at the threshold", "value": known.frr, "interval": known.frr_interval, **about},
    ]


def write_card(
    path: Path, model: Embedder, data: ImageDataset, figures: list[dict[str, Any]], known: Calibration, command: str
) -> None:
    """Put data, command, figures, threshold and limits into the card that `save_pretrained` wrote."""
    rows = "\n".join(f"| {one['name']} | {one['value']:.4f} | {one['of']}: {one['protocol']} |" for one in figures)
    ground = "plain ground, dark or light" if model.preprocess.scan else "clean light ground, not photographed in shade"
    text = CARD.format(
        alphabets=len(alphabets_of(data.classes)),
        characters=len(data.classes),
        drawings=int(np.bincount(data.labels).max()),
        command=command,
        rows=rows,
        threshold=textwrap.fill(f"`{NAME}.verifier` accepts from {known.threshold:.4f} on: {known.protocol}.", 120),
        limits=textwrap.fill(LIMITS.format(ground=ground), 120),
    )
    written = path.read_text(encoding="utf-8").partition("## Licence and limits")[0]
    atomic_write(path, written.replace('"this folder"', f'"{NAME}"') + text)


if __name__ == "__main__":
    try:
        main()
    except (VitembedError, OSError, json.JSONDecodeError) as error:
        print(f"vitembed: error: {error}", file=sys.stderr)
        sys.exit(2)
