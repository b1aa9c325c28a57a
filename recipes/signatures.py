"""Signature verification for writers never seen: skilled forgeries as negatives, error rates by pairs and references.

Papers: multi-similarity loss, Wang et al. 2019 (arXiv:1904.06627); skilled forgeries of some writers in training, to
tell those of others, Hafemann et al. 2017 (arXiv:1705.05787).

    python recipes/signatures.py --data signatures --out runs/signatures
    vitembed train images_background --arch N/8 --image-size 64 --ink --out runs/omniglot
    python recipes/signatures.py --data signatures --out runs/from-omniglot --init runs/omniglot --held-out 047 048

Data: WRITER/genuine and WRITER/forged, such as the Dutch signatures of SigComp2011 (Liwicki et al., ICDAR 2011), or
CEDAR's full_org and full_forg (Kalera et al. 2004). The named writers, or the last nine, are held out and judged. Nine
others, drawn by seed, calibrate a verifier and are not trained on either; --calibrate 0 trains on them, too. Choose
settings on one set of held-out writers and report another. A forgery comes in batches beside the writer whom it
imitates, as a class of its own: it is never a positive. As labelled signatures are few, the network first learns from
those of 1,500 writers who do not exist, with forgeries (generated_signatures.py); --generated changes their number, and
0 leaves them out, as --init does. --jigsaw adds puzzles of the training writers' images.

Ink: the network sees it cut out of its ground and made black. In the Dutch set its darkness alone, without a look at
the signature or at a reference, tells forgeries from genuine images (of all writers to an equal error rate of 7 %, of
the last nine 0 %): they were drawn or scanned otherwise, and what learns that has learned nothing of use. The recipe
prints this control for any data. --grey shows the network the darkness all the same.

A run that ended while it learned from generated signatures goes on there when it is started again.

Pairs: of each writer all pairs of genuine images against as many with a forgery, by one threshold for all writers, and
the mean of the writers' own rates. References: six genuine images of a writer make one score. Writes results.json and,
for each seed, the model, verifier.json and report.html, which has DET curves and the worst mistakes; beside them, the
model of generated signatures alone. Intervals are the outermost bounds of those of all seeds.

Expected of the Dutch set, three seeds, mean and standard deviation: equal error rate by pairs 25.3 +- 2.2 % for skilled
forgeries and 7.7 +- 0.7 % for random ones, by six references (mean) 19.7 +- 0.6 and 4.7 +- 0.9 %; 24 minutes a seed on
one core (benchmarks/RESULTS.md).
"""

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from generated_signatures import generated_signatures  # beside this recipe

from vitembed import metrics
from vitembed.architecture import ViTConfig
from vitembed.embedder import Embedder
from vitembed.errors import DataError, VerifierError, VitembedError, unknown_name
from vitembed.evaluate import EvaluationReport, Figure, evaluate_data
from vitembed.evaluation_page import write_evaluation_page
from vitembed.files import atomic_write
from vitembed.images import load_image
from vitembed.ink import clean_scan, ink_of_cleaned
from vitembed.preprocess import Preprocess
from vitembed.training import Augment, ImageDataset, TrainConfig, build_loss, train
from vitembed.training.jigsaw import JigsawConfig, pretrain_jigsaw
from vitembed.training.outputs import check_out
from vitembed.verify import Verifier, fit_labelled

INK = Preprocess.grey((64, 128), scan=True, binarize=True)  # height and width in pixels: multiples of the patch
STEM = ((32, 2), (64, 1), (64, 2), (128, 1), (128, 2), (192, 1), (192, 2))  # channels and stride of its convolutions
VIT = ViTConfig(INK.size, patch_size=16, channels=1, width=192, depth=2, heads=3, mlp_width=384, stem=STEM)
NETWORK = partial(Embedder.create, VIT, pooling="mean")
LOSS = partial(build_loss, "MultiSimilarityLoss(alpha=2, beta=50, base=0.5)")
GENTLE = Augment(rotate=6, scale=(0.8, 1.2), shear=3, translate=0.06)  # the slope tells a writer: turns are small
SETTINGS = TrainConfig(
    epochs=20,
    classes_per_batch=16,
    images_per_class=4,
    augment=GENTLE,
    optimizer="muon",
    learning_rate=2e-3,
    validation="none",
    workers=0,
)
GENERATED = 1500  # writers
PRETRAINING = replace(SETTINGS, epochs=5, classes_per_batch=32, learning_rate=5e-3)  # on them
PUZZLES = JigsawConfig(tile=2, augment=Augment.named("ink"), workers=0)
FAR = 0.05  # that the verifier is for, of skilled forgeries
FEW = metrics.IDENTITIES_NEEDED  # writers: with fewer there are no intervals


def main() -> None:
    """Read the arguments; an error is one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--held-out", nargs="+", metavar="WRITER", help="the last nine by default")
    parser.add_argument("--init", metavar="MODEL", help="a folder, or another name that Embedder.from_pretrained takes")
    parser.add_argument("--generated", type=int, metavar="WRITERS", help=f"to begin with; {GENERATED}, 0 with --init")
    parser.add_argument("--grey", action="store_true", help="show the network how dark the ink is, too")
    parser.add_argument("--jigsaw", type=int, default=0, metavar="EPOCHS", help="puzzles before training")
    parser.add_argument("--calibrate", type=int, default=FEW, metavar="N", help="writers for the verifier alone")
    parser.add_argument("--epochs", type=int, default=SETTINGS.epochs)
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 10))
    args = parser.parse_args()
    try:
        run(args)
    except (VitembedError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split())}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted; what was learned from generated signatures is kept\n")


def run(args: argparse.Namespace) -> None:
    """Train and judge a model for each seed; after each print and write the figures of all so far."""
    data = ImageDataset.from_signatures(args.data)
    writers = sorted(data.identities, key=lambda name: (len(name), name))  # 9 before 10
    judged = args.held_out or writers[-FEW:]
    if unknown := sorted(set(judged) - set(writers)):
        raise unknown_name("writer", unknown[0], writers)
    others = [name for name in writers if name not in judged]
    if not 0 <= args.calibrate <= len(others) - 2:
        raise DataError(f"{len(others)} writers are not held out; {args.calibrate} to calibrate must leave 2 to train")
    settings = replace(SETTINGS, epochs=args.epochs)
    for seed in range(args.seeds):
        check_out(args.out / f"seed-{seed}", overwrite=False)  # now, and not after puzzles and trainings
    test, reports = data.with_classes(judged), []
    evaluate_data(start(args.init, 0, grey=args.grey), test)  # what cannot be judged is told before the training
    control = darkness_eer(test)
    if control is not None:
        print(f"control, EER by the spread of the ink's darkness alone, one image at a time: {control:.4f}", flush=True)
    for seed in range(args.seeds):
        folder = args.out / f"seed-{seed}"
        drawn = np.random.default_rng(seed).choice(others, args.calibrate, replace=False).tolist()
        known = data.with_classes(set(others) - set(drawn))
        model = pretrained(args, seed, known)
        train(model, known, loss=LOSS(), config=replace(settings, seed=seed), out=folder, progress=True)
        verifier = calibrated(model, data.with_classes(drawn), folder) if drawn else None
        reports.append(evaluate_data(model, test, verifier=verifier))
        write_evaluation_page(folder / "report.html", reports[-1], title=f"Signatures, seed {seed}")  # with DET curves
        runs = [figures(report) for report in reports]  # verifiers may choose different rules for references
        table = {name: over_seeds([run[name] for run in runs]) for name in runs[0] if all(name in run for run in runs)}
        results = {**vars(args), "held_out": judged, "control": control, "figures": table}
        results["reports"] = [report.to_dict() for report in reports]
        atomic_write(args.out / "results.json", json.dumps(results, indent=1, default=str) + "\n")
        for name, row in table.items():
            print(name, *(f"{key}: {value}" for key, value in row.items()), sep="\n    ", flush=True)


def pretrained(args: argparse.Namespace, seed: int, known: ImageDataset) -> Embedder:
    """Return the network as it is before it meets the writers: trained on generated signatures and on puzzles."""
    model = start(args.init, seed, grey=args.grey)
    writers = (0 if args.init else GENERATED) if args.generated is None else args.generated
    if writers:
        print(f"seed {seed}: {writers} writers are generated, and trained on first", flush=True)
        settings, out = replace(PRETRAINING, seed=seed), args.out / f"seed-{seed}-generated"
        train(
            model,
            generated_signatures(writers, seed=seed),
            loss=LOSS(),
            config=settings,
            out=out,
            resume=True,
            progress=True,
        )
    if args.jigsaw:
        pretrain_jigsaw(model, known, config=replace(PUZZLES, epochs=args.jigsaw, seed=seed), progress=True)
    return model


def darkness_eer(data: ImageDataset) -> float | None:
    """Return the EER of telling forgeries from genuine images by one number of each, the spread of its ink's darkness.

    There is no reference: where this is far below a half, the set itself, and not the signature, tells forgeries. Which
    side is a forgery, and from which number on, is chosen by the labels. None where there are no forgeries.
    """
    if data.forgery_of is None:
        return None
    spread = []
    for image in map(load_image, data.images):
        cleaned = clean_scan(image)
        darkness = np.asarray(cleaned)[ink_of_cleaned(cleaned)]
        spread.append(darkness.std() if darkness.size else 0.0)
    eer = metrics.equal_error_rate(np.array(spread), data.forgery_of >= 0)[0]
    return float(min(eer, 1 - eer))


def start(init: str | None, seed: int, *, grey: bool = False) -> Embedder:
    """Return the network before training; one that was trained keeps its channels and their normalisation."""
    ink = replace(INK, binarize=INK.binarize and not grey)
    if init is None:
        return NETWORK(preprocess=ink, seed=seed)
    model = Embedder.from_pretrained(init).replace(image_size=ink.size)  # resamples the positions
    own = model.preprocess
    ink = replace(ink, mode=own.mode, mean=own.mean, std=own.std)
    return Embedder(model.network, ink, device=model.device, provenance=model.provenance)


def calibrated(model: Embedder, data: ImageDataset, folder: Path) -> Verifier | None:
    """Fit a verifier on writers who were not trained on, and save it; None where that cannot be, with a word why."""
    try:
        verifier, lacking = fit_labelled(model, data.images, data.labels, data.forgery_of, FAR, location=str(folder))
    except (DataError, VerifierError) as error:
        verifier, lacking = None, str(error)
    if lacking:
        print(f"not calibrated for {'references' if verifier else 'pairs'}: {lacking}", flush=True)
    if verifier:
        verifier.save(folder / "verifier.json")
    return verifier


def figures(report: EvaluationReport) -> dict[str, Figure]:
    """Return the equal error rates of both protocols, and the error rates at the verifier's threshold."""
    pairs = report.verification
    parts = {"pairs": pairs, **{f"references ({rule})": judged for rule, judged in report.references.rules.items()}}
    table = {f"EER, {name}, {kind}": side.eer for name, part in parts.items() for kind, side in part.kinds.items()}
    table["EER, pairs, skilled, mean of writers"] = Figure(pairs.mean_identity_eer)
    if pairs.decision:
        table |= {"FAR of the verifier, skilled": pairs.decision.far, "FRR of the verifier": pairs.decision.frr}
    return table


def over_seeds(figures: list[Figure]) -> dict[str, object]:
    """Return mean and spread of a figure, and the outermost bounds of its intervals over writers, to four digits."""
    values, bounds = [one.value for one in figures], [bound for one in figures for bound in one.interval or ()]
    spread = round(float(np.std(values, ddof=1)), 4) if len(values) > 1 else None
    shown = {"mean": round(float(np.mean(values)), 4), "standard deviation over seeds": spread}
    interval = [round(min(bounds), 4), round(max(bounds), 4)] if bounds else None
    return {**shown, "95 % over writers": interval, "by seed": [round(value, 4) for value in values]}


if __name__ == "__main__":
    main()
