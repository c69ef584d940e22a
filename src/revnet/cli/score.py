"""`revnet score`."""

import sys

from revnet._image_files import list_images
from revnet._outside_text import encodable, printable
from revnet._result_files import writing_to
from revnet.cli._errors import describe_error
from revnet.cli._image_lines import name_width, printable_path
from revnet.cli._out_file import open_table
from revnet.cli._streams import print_while_writing


def score(
    checkpoint: str,
    images: list[str],
    *,
    csv: str | None = None,
    draws: int = 1,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Print the likelihood of image files under a density of `revnet train nice`.

    Prints the bits per dimension of each file, and their mean. Low numbers are likely images; images unlike the
    training images cost more. A file that cannot be read as an image prints an error; the other files are still scored,
    and the exit status is 1. The weights are named on standard error.

    Examples:
        revnet score runs/cifar10_glow_1 cat.png dog.png
        revnet score runs/photos_glow_1/best.safetensors folder --csv scores.csv

    Args:
        checkpoint: A .safetensors or .ckpt file written by `revnet train nice`, or the folder of a run, whose last
            weights are used; best.safetensors in it holds the best weights on validation.
            Or hub:owner/name, a model on the Hugging Face hub; or the name of weights that come with the package.
        images: Image files of any size, folders, and quoted patterns such as "photos/**/*.jpg". A folder stands for the
            images in it and in the folders inside it.
        csv: CSV file for the scores, with columns for file, bits per dimension and log-probability in nats.
        draws: Number of draws of the noise to average over; more draws give scores that vary less with the seed.
        seed: Seed of the noise.
        device: Device to run on: auto, cpu, cuda, cuda:1, xpu, mps.
    """
    from revnet.training.settings.checks import check_integer

    check_integer("--draws", draws, at_least=1)
    check_integer("--seed", seed, at_least=0, at_most=2**32 - 1)
    table = open_table("--csv", csv, b"file,bits_per_dim,log_prob")
    files = list_images(images)

    from revnet.training.density.score import ImageScore, save_scores, score_each
    from revnet.training.run.used_weights import describe_weights

    errors = []

    def report(error: Exception) -> None:
        errors.append(error)
        print(f"revnet score: error: {printable(encodable(describe_error(error)))}", file=sys.stderr)

    scores: list[ImageScore] = []
    width = name_width(files)
    with print_while_writing(table is not None) as print_line:
        for result in score_each(checkpoint, files, num_draws=draws, seed=seed, device=device, on_error=report):
            if not scores:  # on standard error, as the lines of the images may go to a file
                print(f"weights: {describe_weights(checkpoint)}", file=sys.stderr)
            scores.append(result)
            print_line(f"{printable_path(result.path):{width}}  {result.bits_per_dim:.4f} bits/dim")
        if len(scores) > 1:
            mean = sum(result.bits_per_dim for result in scores) / len(scores)
            print_line(f"{f'mean of {len(scores):,} images':{width}}  {mean:.4f} bits/dim")
        if table is not None:
            with writing_to("--csv", table, "file"):
                save_scores(scores, table)
    if errors:
        raise SystemExit(1)
