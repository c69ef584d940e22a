"""`revnet generate`."""

from __future__ import annotations


def generate(
    checkpoint: str,
    *,
    prompt: str = "\n",
    num: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Continue a text with a language model that `revnet train lm` has trained.

    Prints the prompt and what follows it.

    Examples:
        revnet generate runs/book_lm_1 --prompt "Once upon a time" --num 500
        revnet generate runs/book_lm_1/last.safetensors --temperature 0.7 --top-k 10 --seed 3

    Args:
        checkpoint: A .safetensors or .ckpt file that `revnet train lm` has written, or the folder of a run, whose best
            weights are taken.
        prompt: How the text begins, in characters that the model has seen; a new line if not given.
        num: How many characters to write.
        temperature: Below 1 safer, above 1 wilder; 0 takes the likeliest character.
        top_k: Draw from so many of the likeliest characters only.
        top_p: Draw from the likeliest characters that together have this probability.
        seed: Which of all possible texts.
        device: Where to compute: auto, cpu, cuda, cuda:1, mps.
    """
    from revnet.training.checks import check_integer, check_number

    check_integer("num", num, at_least=1)
    check_integer("seed", seed, at_least=0, at_most=2**32 - 1)
    check_number("temperature", temperature, "0 or more", lambda x: x >= 0, "1 draws as the model was trained")
    if top_k is not None:
        check_integer("top_k", top_k, at_least=1)
    if top_p is not None:
        check_number("top_p", top_p, "above 0 and at most 1", lambda x: 0 < x <= 1, "0.9 is usual")

    import torch

    from revnet.training import load_language_model
    from revnet.training.device import find_device

    place = find_device(device)
    model = load_language_model(checkpoint).to(place)
    generator = torch.Generator(place).manual_seed(seed)
    torch.manual_seed(seed)  # an attention may draw for itself
    text = model.generate(prompt, num, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    print(prompt + text)
