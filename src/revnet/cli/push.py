"""`revnet push`."""

from pathlib import Path


def push(
    checkpoint: str,
    repo_id: str,
    *,
    private: bool | None = None,
    branch: str | None = None,
    message: str | None = None,
    dry_run: str | None = None,
) -> None:
    """Send a run to the Hugging Face hub, with a model card.

    Weights, labels and preprocessing are sent in one commit. The card is written from the files of the run. Other
    commands then take hub:owner/name as their checkpoint. Log in first with `hf auth login`, or set HF_TOKEN.

    Examples:
        revnet push runs/digits_revnet38_1 owner/name --private
        revnet push runs/digits_revnet38_1/best.safetensors owner/name --branch best
        revnet push runs/digits_revnet38_1 owner/name --dry-run folder

    Args:
        checkpoint: The folder of a run, whose last weights are sent, or a .safetensors file in it; or a folder that a
            dry run has written, whose model card is kept.
        repo_id: Name on the hub, as owner/name; it is made if it does not exist.
        private: Whether a new repository is private; by default, its owner's setting.
        branch: Branch to send it to; by default, the main branch.
        message: Message of the commit; by default, it says that revnet pushed it.
        dry_run: Folder for the files, which are then not sent; by default, they are sent.
    """
    from revnet import training

    address = training.push(
        checkpoint, repo_id, private=private, branch=branch, commit_message=message, dry_run=dry_run
    )
    if dry_run is None:
        print(f"pushed  {address}")
        return
    for file in sorted(Path(address).iterdir()):
        print(f"written  {file}  {file.stat().st_size:,} bytes")
    print(f"nothing was sent; `revnet push {address} {repo_id}` sends the folder")
