"""`revnet score`."""

import sys
from pathlib import Path

from revnet.cli._errors import UsageError, describe_error


def score(
    checkpoint: str,
    images: list[str],
    *,
    csv: str | None = None,
    draws: int = 1,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Print the likelihood of image files under a density fitted by `revnet train nice`.

    Prints the bits per dimension of each file, and their mean. Low numbers are likely images; images unlike the
    training images cost more. A file that cannot be read as an image prints an error; the other files are still scored,
    and the exit status is 2.

    Examples:
        revnet score runs/cifar10_glow_1 cat.png dog.png
        revnet score runs/photos_glow_1/best.safetensors folder --csv scores.csv

    Args:
        checkpoint: A .safetensors or .ckpt file written by `revnet train nice`, or the folder of a run, whose last
            weights are used; best.safetensors in it holds the best weights on validation.
        images: Image files of any size and format, or folders, whose images are scored in the order of their names.
        csv: CSV file for the scores, with columns for file, bits per dimension and log-probability in nats.
        draws: Number of draws of the noise to average over; more draws give scores that vary less with the seed.
        seed: Seed of the noise.
        device: Device to run on: auto, cpu, cuda, cuda:1, mps.
    """
    from revnet.training.settings.checks import check_integer

    check_integer("--draws", draws, at_least=1)
    check_integer("--seed", seed, at_least=0, at_most=2**32 - 1)
    table = None if csv is None else Path(csv).expanduser()
    if table is not None and (table.is_dir() or not table.parent.is_dir()):
        raise UsageError(f"`--csv` (={csv}) must be a file in a folder that exists; create the folder, or name a file.")

    from revnet.training.density.score import save_scores, score_each

    errors = []

    def report(error: Exception) -> None:
        errors.append(error)
        print(f"revnet score: error: {describe_error(error)}", file=sys.stderr)

    scores = []
    files = list_images(images)
    width = max(map(len, files))
    for result in score_each(checkpoint, files, num_draws=draws, seed=seed, device=device, on_error=report):
        scores.append(result)
        name = str(result.path).encode(errors="replace").decode()  # a name may hold bytes that are not UTF-8
        print(f"{name:{width}}  {result.bits_per_dim:.4f} bits/dim", flush=True)
    if len(scores) > 1:
        mean = sum(result.bits_per_dim for result in scores) / len(scores)
        print(f"{f'mean of {len(scores):,} images':{width}}  {mean:.4f} bits/dim")
    if table is not None:
        save_scores(scores, table)
    if errors:
        raise SystemExit(2)


def list_images(paths: list[str]) -> list[str]:
    """Return the files among `paths`, and the image files inside the folders among them, sorted by name."""
    from revnet.data.sources.image_folder import find_image_files

    files: list[str] = []
    for path in paths:
        folder = Path(path).expanduser()
        if not folder.is_dir():
            files.append(path)
            continue
        found = find_image_files(folder)
        if not found:
            raise UsageError(
                f"`images` (={path}) is a folder without image files; pass image files, or another folder."
            )
        files += found
    return files
