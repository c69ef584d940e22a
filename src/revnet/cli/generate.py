"""`revnet generate`."""

import sys

from revnet._outside_text import printable


def generate(
    checkpoint: str,
    *,
    prompt: str | None = None,
    num: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: str | None = None,
    use_cache: bool | None = None,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Continue a text with a language model trained by `revnet train lm`.

    Prints the prompt and its continuation, and on standard error the weights.

    Examples:
        revnet generate runs/book_lm_1 --prompt "Once upon a time" --num 500
        revnet generate runs/book_lm_1/best.safetensors --temperature 0.7 --top-k 10 --seed 3

    Args:
        checkpoint: A .safetensors or .ckpt file written by `revnet train lm`, or the folder of a run, whose last
            weights are used; best.safetensors in it holds the best weights on validation.
            Or hub:owner/name, a model on the Hugging Face hub; or the name of weights that come with the package.
        prompt: Beginning of the text, in characters of the training text if these are the tokens. By default, a model
            of documents begins a new one. Others begin with a newline, or the first character of the vocabulary if the
            training text has no newline.
        num: Number of tokens to generate. A document may end before.
        temperature: Divides the logits. Lower values give more predictable text; 0 always takes the most likely
            character.
        top_k: Sample only from this number of most likely characters.
        top_p: Sample only from the most likely characters whose probabilities sum to this.
        stop: Token at which to stop early. By default, only the end of a document stops.
        use_cache: Whether to keep the keys and values of earlier characters instead of computing them again for each
            new one. By default, they are kept if the attention is `full`. The text is the same.
        seed: Seed of the sampling.
        device: Device to run on: auto, cpu, cuda, cuda:1, xpu, mps.
    """
    from revnet.training.settings.checks import check_integer, check_number

    check_integer("--num", num, at_least=1)
    check_integer("--seed", seed, at_least=0, at_most=2**32 - 1)
    check_number("--temperature", temperature, "0 or more", lambda x: x >= 0, "1 samples from the model unchanged")
    if top_k is not None:
        check_integer("--top-k", top_k, at_least=1)
    if top_p is not None:
        check_number("--top-p", top_p, "above 0 and at most 1", lambda x: 0 < x <= 1, "0.9 is usual")

    import torch

    from revnet.training import load_language_model
    from revnet.training.device import find_device
    from revnet.training.run.used_weights import describe_weights

    torch_device = find_device(device)
    model = load_language_model(checkpoint).to(torch_device)
    if prompt is None:
        prompt = model.usual_prompt
    generator = torch.Generator(torch_device).manual_seed(seed)
    torch.manual_seed(seed)  # LSH attention draws its hashes from the global generator
    text = model.generate(
        prompt,
        num,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop=stop,
        use_cache=use_cache,
        generator=generator,
    )
    print(f"weights: {describe_weights(checkpoint)}", file=sys.stderr)  # the text may go to a file
    # The characters are from a file that others may have written.
    print("".join(letter if letter in "\n\t" else printable(letter) for letter in prompt + text))
